"""Build TensorRT engines, and describe each engine in a sidecar."""
