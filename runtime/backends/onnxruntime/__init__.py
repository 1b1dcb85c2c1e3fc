"""The ONNX Runtime backend, for CPUs and GPUs."""
