"""Latency and throughput of model files, side by side."""
