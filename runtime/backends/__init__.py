"""What can run a model file: one module a library, all checks in `base`."""
