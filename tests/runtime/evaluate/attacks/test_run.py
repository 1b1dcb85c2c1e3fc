"""Attacks on models: worst case, transfer, batches, resuming, and the content of results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import ConfigError, Interrupted, SpecError, VerificationError
from runtime.evaluate.attacks.config import ATTACKS, AttackConfig, default_attacks, default_epsilon
from runtime.evaluate.attacks.methods import Attacker
from runtime.evaluate.attacks.results import AttackResult
from runtime.evaluate.attacks.run import AttackedModel, attack
from runtime.evaluate.models import Model, load_model
from runtime.evaluate.report.inputs import attack_of
from tests.support.attack_sets import digit_attacker, with_logits
from tests.support.evaluation_sets import config as suite_config
from tests.support.evaluation_sets import labeled_folder, spec_of, toy
from tests.support.report_sets import digit_folder, digit_net, quantized

STRONG = AttackConfig(attacks=ATTACKS, epsilons=(4, 20), queries=40, draws=5, steps=5)


@dataclasses.dataclass
class Digits:
    models: tuple[Model, Model]
    attacker: Attacker
    data: Path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Return a network in FP32 and INT8, its checkpoint, and 40 digits it was not fitted to."""
    folder = tmp_path_factory.mktemp("digits")
    file = digit_net(folder / "net.onnx")
    int8 = quantized(file, digit_folder(folder / "calibration", range(48)), folder / "net.int8.onnx")
    models = (load_model(file, device="cpu", threads=1), load_model(int8, device="cpu", threads=1))
    return Digits(models, digit_attacker(file, models[0]), digit_folder(folder / "set", range(1500, 1540)))


def attacked(digits: Digits, out: Path, config: AttackConfig = STRONG, **options: Any) -> list[AttackResult]:
    models = [AttackedModel(model=model, attacks=config.attacks) for model in digits.models]
    return attack(models, suite_config("imagenet", digits.data), config, out=out, attacker=digits.attacker, **options)


def rights(result: AttackResult, name: str) -> list[np.ndarray]:
    """Return which images are classified correctly, for each ε from 0."""
    (curve,) = [curve for curve in result["curves"] if curve["attack"] == name]
    bits = [np.frombuffer(bytes.fromhex(point["right_bits"]), np.uint8) for point in curve["points"]]
    found = [np.unpackbits(part)[: result["images"]].astype(bool) for part in bits]
    assert [int(part.sum()) for part in found] == [point["right"] for point in curve["points"]]
    return found


@pytest.fixture(scope="module")
def results(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> list[AttackResult]:
    return attacked(digits, tmp_path_factory.mktemp("out"))


def test_the_worst_case_is_computed_per_image(results: list[AttackResult]) -> None:
    for result in results:
        real = [rights(result, name) for name in ("pgd", "apgd", "square")]
        worst = rights(result, "worst")
        for place in range(3):
            assert np.array_equal(worst[place], np.all([found[place] for found in real], axis=0))
        clean, weak, strong = (int(found.sum()) for found in worst)
        assert clean > weak > strong
        noise = rights(result, "noise")
        assert noise[2].sum() > strong + 10
        assert all(
            not (found & ~noise[0]).any() for found in noise
        )  # an image that is wrong without an attack stays wrong
        assert all(np.array_equal(found[0], noise[0]) for found in real)


def test_content_of_a_result(results: list[AttackResult], digits: Digits) -> None:
    for result in results:
        assert json.loads(json.dumps(result)) == result
        read = attack_of(result, "here")
        assert [curve.attack for curve in read.curves] == ["pgd", "apgd", "square", "noise", "worst"]
        assert [curve.queries for curve in read.curves] == [1, 2, 40, 5, None]
        assert [epsilon * 255 for epsilon, _ in read.curves[0].points] == pytest.approx([0, 4, 20])
        assert read.images == 40
        assert result["checkpoint"] == {"name": "net.main", "sha256": "of the checkpoint"}
        assert result["settings"]["epsilons"] == [4, 20]
        curve = next(curve for curve in result["curves"] if curve["attack"] == "square")
        fooled = curve["points"][0]["right"] - curve["points"][2]["right"]
        total, mean = curve["points"][2]["queries_total"], curve["points"][2]["queries_mean_of_fooled"]
        assert total == round(mean * fooled) + 40 * curve["points"][2]["right"]
        assert {curve.get("white_box") for curve in result["curves"]} == {False, None}
    names = {result["names_sha256"] for result in results}
    assert len(names) == 1


def test_the_batch_size_does_not_change_the_result(digits: Digits, results: list[AttackResult], tmp_path: Path) -> None:
    config = dataclasses.replace(STRONG, attacks=("square", "noise", "pgd"))
    for place, size in enumerate((7, 40)):
        for result, known in zip(
            attacked(digits, tmp_path / str(place), config, batch_size=size), results, strict=True
        ):
            for name in config.attacks:
                found, expected = rights(result, name), rights(known, name)
                # Equal, except for float noise of the network in batches of other sizes.
                assert sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True)) <= 1, name


class Stopped(Exception):
    """Simulates a killed process."""


def stopping_after(count: int, error: type[BaseException]) -> Callable[[float, int], None]:
    def progress(done: float, total: int) -> None:
        if done >= count:
            raise error

    return progress


def test_a_killed_and_resumed_run_equals_one_run(digits: Digits, results: list[AttackResult], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        attacked(digits, tmp_path, progress=stopping_after(5, Stopped))
    (log,) = tmp_path.glob(".unfinished-*")
    log.write_bytes(log.read_bytes() + b'{"attack": "square", "eps')  # killed in the middle of a line
    with pytest.raises(
        Interrupted, match=r"stopped: 1[12] of 27 steps are finished; run the same command to resume"
    ) as caught:
        attacked(digits, tmp_path, progress=stopping_after(12, KeyboardInterrupt))
    assert caught.value.exit_code == 130
    seen: list[float] = []
    assert attacked(digits, tmp_path, progress=lambda done, total: seen.append(done)) == results
    assert seen[0] >= 11
    assert not list(tmp_path.iterdir())


def test_a_model_gets_only_its_attacks(digits: Digits, tmp_path: Path) -> None:
    config = dataclasses.replace(STRONG, attacks=("pgd", "noise"), epsilons=(4,))
    checkpoint = dataclasses.replace(digits.models[0], name="net.main", facts=digits.attacker.facts)
    made = dataclasses.replace(
        digits.models[1], facts={**digits.models[1].facts, "checkpoint_sha256": "of the checkpoint"}
    )
    models = [AttackedModel(model=checkpoint, attacks=("pgd",)), AttackedModel(model=made, attacks=("pgd", "noise"))]
    data = suite_config("imagenet", digits.data, limit=12)
    own, file = attack(models, data, config, out=tmp_path, attacker=digits.attacker)
    assert [curve["attack"] for curve in own["curves"]] == ["pgd", "worst"]
    assert own["images"] == 12
    assert own["curves"][0]["white_box"]
    assert file["curves"][0]["of_own_checkpoint"]
    assert not file["curves"][0]["white_box"]


def test_images_outside_the_ball_are_refused(digits: Digits, tmp_path: Path) -> None:
    def cheats(attack: str, images_NHWC: np.ndarray, labels_N: np.ndarray, **options: Any) -> np.ndarray:
        return np.where(images_NHWC < 128, images_NHWC + 5, images_NHWC - 5)[None].astype(np.uint8)

    cheat = dataclasses.replace(digits, attacker=dataclasses.replace(digits.attacker, craft=cheats))
    with pytest.raises(VerificationError, match="pgd changed a pixel by 5/255; ε allows 4/255"):
        attacked(cheat, tmp_path)


def test_models_that_cannot_share_images_are_refused(digits: Digits, tmp_path: Path) -> None:
    data, both = suite_config("imagenet", digits.data), ATTACKS
    other = toy(spec=spec_of(size=16))
    one, attacker = AttackedModel(model=digits.models[0], attacks=both), digits.attacker
    with pytest.raises(
        ConfigError, match=r"toy has other classes.*found 16×16 pixels and 3 classes, expected.*10 classes"
    ):
        attack([one, AttackedModel(model=other, attacks=both)], data, STRONG, out=tmp_path, attacker=attacker)
    with pytest.raises(ConfigError, match=r"the checkpoint net\.main has other classes"):
        strange = dataclasses.replace(attacker, spec=spec_of())
        attack([one], data, STRONG, out=tmp_path, attacker=strange)
    with pytest.raises(ConfigError, match=r"pgd, apgd need a gradient.*--checkpoint best\.pt"):
        attack([one], data, STRONG, out=tmp_path)
    with pytest.raises(ConfigError, match="batch_size"):
        attack([one], data, STRONG, out=tmp_path, attacker=attacker, batch_size=0)
    labeled_folder(tmp_path / "set", count=1)
    bad = with_logits(toy(), lambda images: np.zeros((len(images), 4), np.float32))
    square = AttackConfig(attacks=("square",), epsilons=(4,))
    with pytest.raises(SpecError, match=r"shape \(3, 4\) for 3 images; expected a logit for each of its 3 classes"):
        attack(
            [AttackedModel(model=bad, attacks=("square",))],
            suite_config("imagenet", tmp_path / "set"),
            square,
            out=tmp_path,
        )


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown attack 'sqare'; did you mean square"):
        AttackConfig(attacks=("sqare",), epsilons=(4,))
    wrong: list[dict[str, Any]] = [{"queries": 0}, {"draws": 0}, {"steps": 0}, {"restarts": 0}, {"initial_share": 0.0}]
    for options in wrong:
        with pytest.raises(ConfigError, match="must be"):
            AttackConfig(attacks=("square",), epsilons=(4,), **options)
    for attacks, epsilons in (((), (4,)), (("square",), ())):
        with pytest.raises(ConfigError, match="at least one attack and one ε"):
            AttackConfig(attacks=attacks, epsilons=epsilons)
    config = AttackConfig(attacks=("noise", "pgd", "noise"), epsilons=(4, 1, 4))
    assert (config.attacks, config.epsilons, config.gradient) == (("pgd", "noise"), (1, 4), ("pgd",))
    assert (default_attacks(True), default_attacks(False)) == (ATTACKS, ("square", "noise"))
    assert [default_epsilon(spec_of(size=size)) for size in (32, 64, 224)] == [8, 8, 4]
