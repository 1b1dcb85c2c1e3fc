"""Memory on GPUs: the CUDA calls, and arrays that cross the border to other libraries without being copied."""
