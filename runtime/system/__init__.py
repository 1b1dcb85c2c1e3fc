"""Files, locks, the cache folder, the CPU, the GPU, the terminal and command-line options."""
