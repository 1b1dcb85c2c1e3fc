"""What a network's tensors hold on real images: the measurements that precision needs."""

from __future__ import annotations

from calib.collect import collect_amax

__all__ = ["collect_amax"]
