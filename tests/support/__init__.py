"""What several tests share: models, images, stand-ins, and where the repository is."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ROOT", "SHARED_DATA"]

ROOT = Path(__file__).parents[2]
"""The repository."""
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real images, if they lie next to the checkout; tests that need them are skipped otherwise."""
