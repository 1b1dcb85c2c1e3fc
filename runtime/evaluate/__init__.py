"""Measures how robust a classifier is. Each idea is a module of its own, imported when it is used."""

from __future__ import annotations
