"""Adapt a deployed classifier to the place where it runs, by its BatchNorm statistics."""
