"""GPU memory: CUDA driver calls, and zero-copy exchange of arrays with other libraries."""
