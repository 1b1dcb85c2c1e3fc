"""TensorRT 10, TensorRT 11 and TensorRT-RTX: validated engines and what runs them."""
