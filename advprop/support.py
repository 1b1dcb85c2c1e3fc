"""Report which backends of this machine can run a model file, and why others cannot."""

from __future__ import annotations

from advprop.doctor import Finding, check
from runtime.engine.flavors import RTX_DEFAULT_SMS
from runtime.engine.sidecar import EngineInfo
from runtime.graph.summary import OnnxSummary
from runtime.system.gpu import find_gpu

__all__ = ["engine_support", "onnx_support"]


def onnx_support(summary: OnnxSummary) -> list[str]:
    """Return one line per backend: whether it can run the ONNX file or build an engine from it."""
    has_bf16 = "bf16" in summary.weights
    problems = f"no, {'; '.join(summary.engine_problems)}" if summary.engine_problems else ""
    cpu = "no, it has no BF16 convolutions on the CPU" if has_bf16 else _availability(check("onnxruntime"))
    return [
        f"ONNX Runtime on the CPU: {cpu}",
        f"ONNX Runtime on the GPU: {_availability(check('onnxruntime_gpu'))}",
        f"engine with TensorRT: {problems or _availability(check('tensorrt'))}",
        f"engine with TensorRT-RTX: {problems or _availability(check('tensorrt_rtx'))}",
    ]


def engine_support(info: EngineInfo) -> list[str]:
    """Return a list with one line: whether the engine can run here, or what is missing."""
    finding = check(info.flavor)
    gpu = find_gpu()
    problems = []
    if gpu is None:
        problems.append("there is no NVIDIA GPU")
    elif f"sm_{gpu.sm}" not in info.compute_capabilities and not _is_default_target(info, gpu.sm):
        problems.append(f"{gpu.name} is SM {gpu.sm}")
    if finding.state != "ok":
        problems.append(f"{info.flavor} {info.version} is required: {finding.found}")
    elif finding.found != info.version:
        problems.append(f"{info.flavor} {finding.found} is installed, but {info.version} is required: build it again")
    return [f"here: {'no, ' + '; '.join(problems) if problems else 'yes'}"]


def _is_default_target(info: EngineInfo, sm: int) -> bool:
    """Return whether the engine has TensorRT-RTX's default targets, and `sm` is one of them."""
    return info.compute_capabilities == ("default",) and sm in RTX_DEFAULT_SMS


def _availability(finding: Finding) -> str:
    return "yes" if finding.state == "ok" else f"no, {finding.found}"
