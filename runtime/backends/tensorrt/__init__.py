"""The TensorRT backend: TensorRT 10, TensorRT 11 and TensorRT-RTX."""
