"""What is measured, and what trtexec calls it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUANTITIES", "Quantity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One of the times that a point has."""

    meaning: str
    """From where to where."""
    trtexec: str = ""
    """Its name in the log of trtexec 8.5 to 11, and of tensorrt_rtx; empty where these have none."""
    trtexec_documents: str = ""
    """Its name in documents of TensorRT 8 to 10, where that is another."""


QUANTITIES = {
    "compute": Quantity(
        meaning="the network alone, on prepared tensors; `clock` says how it is measured",
        trtexec="GPU Compute Time",
    ),
    "h2d": Quantity(meaning="input tensors to the GPU, from pinned memory, by events", trtexec="H2D Latency"),
    "d2h": Quantity(meaning="output tensors to the CPU, by events", trtexec="D2H Latency"),
    "enqueue": Quantity(meaning="the host putting copies and kernels on the stream", trtexec="Enqueue Time"),
    "latency": Quantity(meaning="h2d + compute + d2h of one call", trtexec="Latency", trtexec_documents="Host Latency"),
    "end_to_end": Quantity(
        meaning="`Session.run`: host tensors in, host logits out, checks and waiting included; host clock. Not "
        "trtexec's End-to-End Host Latency, which counts the wait for the query before"
    ),
    "predict": Quantity(meaning="`Session.predict`: encoded images in, labels out; host clock"),
    "decode": Quantity(meaning="a part of predict: JPEG to RGB"),
    "transform": Quantity(meaning="a part of predict: resize, crop, and make it the network's input"),
    "run": Quantity(meaning="a part of predict: the network, and its answers as labels"),
}
"""Name → what it is. In JSON each has `p50_ms` and the like."""
