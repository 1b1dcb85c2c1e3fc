"""Subcommands of `advprop` that need nothing but the runtime, one a module."""
