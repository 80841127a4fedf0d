"""The Triton backend, one file per operation; installed as `fastreward.kernels`."""
