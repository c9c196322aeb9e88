"""ladder_kernels."""
