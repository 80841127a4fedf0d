"""Device functions and launch helpers that the Triton kernels of several operations share."""
