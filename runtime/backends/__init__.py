"""Backends, which run a model file: one package per library, with the shared checks in `base`."""
