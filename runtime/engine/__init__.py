"""TensorRT engines: building them, and the sidecar that says what each one is."""
