"""Compare a joint training step on two branches with steps of two separate networks.

The reference consists of two independent copies of timm's network, one for the clean and one for
the adversarial images. They have no routed layers: each runs the forward methods of its own
BatchNorms. Their weights are equal; the parameters and statistics of their BatchNorms differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from train.attack import eval_mode, frozen
from train.dual_bn import add_auxiliary_bns, route
from train.models import to_channels_last

CLASSES = 10
COUNTS = (3, 2)
"""Clean and adversarial images."""

FLOAT32, FLOAT64 = 1e-4, 1e-8
"""Largest allowed relative difference of each data type. In float64, four times the effect of
rounding the images is also allowed: networks that normalize very few values amplify rounding."""
AMP = 4 * 2.0**-8
"""Largest allowed relative difference under AMP: four times the rounding error of bfloat16. The
joint pass rounds the sum of two gradients, and the separate passes round each of them. Twice the
difference between the separate steps under AMP and in float32 is also allowed: torch's LayerNorm
sums its gradients over all tokens in bfloat16."""

Tensors = dict[str, torch.Tensor]
Differences = dict[str, float]
"""Largest relative difference of the logits, of the gradients and of the statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A joint step compared with separate steps, in one memory layout."""

    calls: int
    """BatchNorm calls of the joint pass."""
    fast: int
    """Calls that `normalize_parts` computed; the others ran the layers' own forward methods."""
    float32: Differences
    """Training step in float32."""
    attack: Differences
    """Logits and input gradient in evaluation mode, in float32."""
    amp: Differences
    """Training step under bfloat16 autocast."""
    amp_rounding: Differences
    """Separate steps under bfloat16 autocast, compared with separate steps in float32."""
    broken: int
    """Gradients that are not finite or far too large in the separate steps under autocast, and are not
    compared. torch's bfloat16 convolutions return uninitialized memory for some shapes."""
    float64: Differences | None
    """Larger one of training step and attack in float64; None if float32 is within its bound."""
    float64_rounding: Differences | None
    """Change of the separate step and attack in float64 if each pixel changes by two units in its last
    place; None if `float64` is None."""

    @property
    def faults(self) -> list[str]:
        """Differences that rounding does not explain."""
        faults = []
        for name, found in {"float32": self.float32, "attack": self.attack}.items():
            if not (_worst(found) <= FLOAT32 or self._is_exact_in_float64()):
                faults.append(f"{name}: {found}; float64: {self.float64}; rounding alone: {self.float64_rounding}")
        for name, difference in self.amp.items():
            if not difference <= max(AMP, 2 * self.amp_rounding[name]):
                faults.append(f"AMP, {name}: {difference:.1e}; rounding alone: {self.amp_rounding[name]:.1e}")
        return faults

    def _is_exact_in_float64(self) -> bool:
        if self.float64 is None or self.float64_rounding is None:
            return False
        return all(value <= max(FLOAT64, 4 * self.float64_rounding[name]) for name, value in self.float64.items())


class Networks:
    """A network with routed BatchNorms and its two references, with dropout off."""

    def __init__(self, arch: str) -> None:
        torch.manual_seed(0)
        self.clean = _without_dropout(arch)
        self.adversarial = copy.deepcopy(self.clean)
        for first_seed, model in ((0, self.clean), (100_000, self.adversarial)):
            for number, layer in enumerate(_batch_norms(model).values()):
                _randomize(layer, first_seed + number)
        self.joint = add_auxiliary_bns(copy.deepcopy(self.clean), ["adv"])
        state = self.joint.state_dict()
        for name, layer in _batch_norms(self.adversarial).items():
            for key, value in layer.state_dict().items():
                state[f"{name}.aux.adv.{key}"].copy_(value)
        self._buffers = [[buffer.clone() for buffer in model.buffers()] for model in self._all()]

    def prepare(self, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        """Set data type and memory layout, restore the initial statistics, and remove gradients."""
        for model, buffers in zip(self._all(), self._buffers, strict=True):
            model.to(dtype)
            for parameter in model.parameters():
                parameter.grad = None
                parameter.data = parameter.data.contiguous()
            for buffer, initial in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(initial)
            if memory_format == torch.channels_last:
                to_channels_last(model)

    def _all(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.joint, self.clean, self.adversarial


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a forward and backward pass returns and changes."""

    logits: Tensors
    gradients: Tensors
    """By parameter name of the routed network."""
    statistics: Tensors
    """All buffers after the step, by name in the routed network."""

    def without_gradients(self, names: set[str]) -> Step:
        """Return the step without some gradients."""
        kept = {name: value for name, value in self.gradients.items() if name not in names}
        return Step(logits=self.logits, gradients=kept, statistics=self.statistics)

    def difference(self, expected: Step) -> Differences:
        """Return the relative differences from the expected step."""
        return {
            "logits": relative(self.logits, expected.logits),
            "gradients": relative(self.gradients, expected.gradients),
            "statistics": relative(self.statistics, expected.statistics),
        }


def compare_steps(networks: Networks, size: int, memory_format: torch.memory_format) -> Comparison:
    """Compare joint with separate passes on images of `size` pixels."""
    images, labels = _make_images(size)
    images = images.contiguous(memory_format=memory_format)

    networks.prepare(torch.float32, memory_format)
    attack = _compare_attacks(networks, images, labels)
    with _counted_calls(networks.clean) as calls:
        expected = separate_step(networks, images, labels, amp=False)
    joint, fast = joint_step(networks, images, labels, amp=False)
    float32 = joint.difference(expected)

    networks.prepare(torch.float32, memory_format)
    expected_amp = separate_step(networks, images, labels, amp=True)
    broken = {
        name
        for name, value in expected_amp.gradients.items()
        if not _largest(value) <= 100 * max(_largest(expected.gradients[name]), 1e-3)
    }
    expected_amp = expected_amp.without_gradients(broken)
    amp_rounding = expected_amp.difference(expected.without_gradients(broken))
    joint_amp, _ = joint_step(networks, images, labels, amp=True)
    float64 = float64_rounding = None
    if max(_worst(float32), _worst(attack)) > FLOAT32:
        float64, float64_rounding = _compare_in_float64(networks, images.double(), labels, memory_format)
    return Comparison(
        calls=len(calls),
        fast=fast,
        float32=float32,
        attack=attack,
        amp=joint_amp.without_gradients(broken).difference(expected_amp),
        amp_rounding=amp_rounding,
        broken=len(broken),
        float64=float64,
        float64_rounding=float64_rounding,
    )


def _compare_in_float64(
    networks: Networks, images: torch.Tensor, labels: torch.Tensor, memory_format: torch.memory_format
) -> tuple[Differences, Differences]:
    """Return the differences of the joint pass, and those of separate passes on rounded images."""

    def separate(inputs: torch.Tensor) -> tuple[Step, Step]:
        networks.prepare(torch.float64, memory_format)
        attack = attack_pass(networks, inputs, labels, routed=False)
        return separate_step(networks, inputs, labels, amp=False), attack

    step, attack = separate(images)
    rounded_step, rounded_attack = separate(_round_images(images))
    networks.prepare(torch.float64, memory_format)
    joint_attack = attack_pass(networks, images, labels, routed=True)
    joint = joint_step(networks, images, labels, amp=False)[0]
    return (
        _larger(joint.difference(step), joint_attack.difference(attack)),
        _larger(rounded_step.difference(step), rounded_attack.difference(attack)),
    )


def _round_images(images: torch.Tensor) -> torch.Tensor:
    """Change each float64 pixel by two units in its last place, up or down."""
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    return images * (1 + signs * 2.0**-51)


def _larger(one: Differences, other: Differences) -> Differences:
    return {name: max(value, other[name]) for name, value in one.items()}


def relative(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Return the largest |difference| of the tensors, each relative to its largest magnitude.

    A tensor whose values are below a thousandth of the largest magnitude of all tensors is related
    to that thousandth: the gradient of a bias before a BatchNorm is zero except for rounding.
    Returns infinity if the names differ or if a value is not finite.
    """
    if found.keys() != expected.keys():
        return float("inf")
    floor = 1e-3 * max(map(_largest, expected.values()), default=0.0)
    worst = 0.0
    for name, value in expected.items():
        if not (_is_finite(value) and _is_finite(found[name])):
            return float("inf")
        worst = max(worst, _largest(found[name] - value) / max(_largest(value), floor, 1e-30))
    return worst


def _largest(value: torch.Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _worst(differences: Differences) -> float:
    return max(differences.values())


def _make_images(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of both branches, float32 (N, 3, size, size), and their labels."""
    generator = torch.Generator().manual_seed(0)
    count = sum(COUNTS)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1, torch.arange(count)


def joint_step(networks: Networks, images: torch.Tensor, labels: torch.Tensor, *, amp: bool) -> tuple[Step, int]:
    """Return the step of the routed network, and how many calls `normalize_parts` computed."""
    model = networks.joint.train()
    with route(model, *zip(("main", "adv"), COUNTS, strict=True)):
        logits = _forward(model, images, amp)
    losses = [F.cross_entropy(*part) for part in zip(logits.split(COUNTS), labels.split(COUNTS), strict=True)]
    loss = losses[0] + losses[1]
    fast = _count_nodes(loss, "_NormalizedPartsBackward")
    loss.backward()
    step = Step(logits={"logits": logits.detach()}, gradients=_gradients(model), statistics=_statistics(model))
    return step, fast


def separate_step(networks: Networks, images: torch.Tensor, labels: torch.Tensor, *, amp: bool) -> Step:
    """Return the step of the two separate networks, under the names of the routed network."""
    clean, adversarial = networks.clean.train(), networks.adversarial.train()
    logits = []
    for model, *part in zip((clean, adversarial), images.split(COUNTS), labels.split(COUNTS), strict=True):
        logits.append(_forward(model, part[0], amp))
        F.cross_entropy(logits[-1], part[1]).backward()
    norms = set(_batch_norms(clean))
    return Step(
        logits={"logits": torch.cat(logits).detach()},
        gradients=_under_routed_names(_gradients(clean), _gradients(adversarial), norms, torch.add),
        statistics=_under_routed_names(_statistics(clean), _statistics(adversarial), norms, lambda one, _: one),
    )


def attack_pass(networks: Networks, images: torch.Tensor, labels: torch.Tensor, *, routed: bool) -> Step:
    """Return logits and input gradient in evaluation mode, with the adversarial BatchNorms.

    `routed` selects the routed network, as an attack runs it; otherwise the separate one is used.
    """
    model = networks.joint if routed else networks.adversarial
    images = images.detach().clone().requires_grad_(True)
    with frozen(model), eval_mode(model), route(model, "adv" if routed else "main"):
        logits = model(images)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), images)
    return Step(logits={"logits": logits.detach()}, gradients={"images": gradient}, statistics={})


def _compare_attacks(networks: Networks, images: torch.Tensor, labels: torch.Tensor) -> Differences:
    found, expected = (attack_pass(networks, images, labels, routed=routed) for routed in (True, False))
    return found.difference(expected)


def _without_dropout(arch: str) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(arch, num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
    except TypeError:  # the architecture has no stochastic depth
        model = timm.create_model(arch, num_classes=CLASSES, drop_rate=0.0)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _randomize(layer: _BatchNorm, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor, low, high in (
        (layer.weight, 0.5, 1.5),
        (layer.bias, -0.2, 0.2),
        (layer.running_mean, -0.1, 0.1),
        (layer.running_var, 0.5, 1.5),
    ):
        if tensor is not None:
            tensor.data.uniform_(low, high, generator=generator)


def _forward(model: nn.Module, images: torch.Tensor, amp: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits: torch.Tensor = model(images)
    return logits.float() if amp else logits


def _gradients(model: nn.Module) -> Tensors:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def _statistics(model: nn.Module) -> Tensors:
    return {name: value.clone() for name, value in model.named_buffers()}


def _under_routed_names(
    clean: Tensors,
    adversarial: Tensors,
    norms: set[str],
    shared: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Tensors:
    """Name tensors as the routed network does; `shared` joins those that are in no BatchNorm."""
    named: Tensors = {}
    for name, value in clean.items():
        layer, _, key = name.rpartition(".")
        if layer in norms:
            named[name], named[f"{layer}.aux.adv.{key}"] = value, adversarial[name]
        else:
            named[name] = shared(value, adversarial[name])
    return named


@contextmanager
def _counted_calls(model: nn.Module) -> Iterator[list[None]]:
    """Yield a list that gets one entry for each call of a BatchNorm inside the context."""
    calls: list[None] = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(None)) for layer in _batch_norms(model).values()]
    yield calls
    for handle in handles:
        handle.remove()


def _count_nodes(loss: torch.Tensor, name: str) -> int:
    """Return the number of nodes called `name` in the autograd graph of `loss`."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(node.name() == name for node in seen)
