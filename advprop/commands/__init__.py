"""Subcommands of `advprop` that need only the runtime, one per module."""
