"""Throughput and latency of `advprop serve` and of other servers. See `python -m benchmarks.serving --help`."""
