"""The machine and the command line: files, locks, caches, CPU and GPU facts, terminal output."""
