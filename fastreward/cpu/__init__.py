"""The CPU backend: thin wrappers that hand tensors' data pointers to the C++ kernels in fastreward._core."""
