"""Build TensorRT engines, and describe each one in a sidecar."""
