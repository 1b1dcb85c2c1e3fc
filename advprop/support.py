"""Which backends of this machine can run a model file, and why the others cannot."""

from __future__ import annotations

from advprop.doctor import Finding, look
from runtime.engine.flavors import RTX_DEFAULT_SMS
from runtime.engine.sidecar import EngineInfo
from runtime.graph.summary import OnnxSummary
from runtime.system.gpu import find_gpu

__all__ = ["engine_support", "onnx_support"]


def onnx_support(summary: OnnxSummary) -> list[str]:
    """Returns a line a backend: what it can do with the ONNX file."""
    bf16 = "bf16" in summary.weights
    cpu = "no, it has no BF16 convolutions there" if bf16 else _yes_or_why(look("onnxruntime"))
    return [
        f"ONNX Runtime on the CPU: {cpu}",
        f"ONNX Runtime on the GPU: {_yes_or_why(look('onnxruntime_gpu'))}",
        f"engine by TensorRT: {_yes_or_why(look('tensorrt'))}",
        f"engine by TensorRT-RTX: {_yes_or_why(look('tensorrt_rtx'))}",
    ]


def engine_support(info: EngineInfo) -> list[str]:
    """Returns whether the engine can run here, or what it lacks."""
    finding = look(info.flavor)
    gpu = find_gpu()
    problems = []
    if gpu is None:
        problems.append("there is no NVIDIA GPU")
    elif f"sm_{gpu.sm}" not in info.compute_capabilities and not _by_default(info, gpu.sm):
        problems.append(f"{gpu.name} is SM {gpu.sm}")
    if finding.state != "ok":
        problems.append(f"{info.flavor} {info.version} is needed: {finding.found}")
    elif finding.found != info.version:
        problems.append(f"{info.flavor} is {finding.found}, the engine is of {info.version}: build it again")
    return [f"here: {'no, ' + '; '.join(problems) if problems else 'yes'}"]


def _by_default(info: EngineInfo, sm: int) -> bool:
    """Whether TensorRT-RTX's own choice of targets has that one."""
    return info.compute_capabilities == ("default",) and sm in RTX_DEFAULT_SMS


def _yes_or_why(finding: Finding) -> str:
    return "yes" if finding.state == "ok" else f"no, {finding.found}"
