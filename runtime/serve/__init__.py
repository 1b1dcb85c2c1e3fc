"""Serve model files over HTTP and gRPC, with the Open Inference Protocol v2.

    from runtime.serve import ServeConfig, serve

The names load when they are first used, so importing this package needs only NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.system.lazy import lazy_names

if TYPE_CHECKING:
    from runtime.serve.config import ModelSource, ServeConfig
    from runtime.serve.models import Registry
    from runtime.serve.workers import serve

__all__ = ["ModelSource", "Registry", "ServeConfig", "serve"]

__getattr__ = lazy_names(
    __name__,
    {
        "ModelSource": f"{__name__}.config",
        "Registry": f"{__name__}.models",
        "ServeConfig": f"{__name__}.config",
        "serve": f"{__name__}.workers",
    },
)
