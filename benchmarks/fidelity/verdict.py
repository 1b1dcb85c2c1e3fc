"""The statements of the slides, and advice that follows from the measured intervals."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.fidelity.plan import LONG
from benchmarks.fidelity.results import Difference, Results, Verdict, paired

__all__ = ["STATEMENTS", "Statement", "advice"]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement about the difference between two recipes."""

    text: str
    """The statement."""
    recipe: str
    reference: str
    metric: str
    """One of METRICS, on the main route."""
    sign: int
    """1 if the statement claims a positive difference, −1 for a negative one."""

    @property
    def quantity(self) -> str:
        """The measured difference as text."""
        return f"{self.metric}, `{self.recipe}` − `{self.reference}`"

    def measure(self, results: Results) -> Difference | None:
        """Return the difference, or None if it is not measured yet."""
        return paired(results.values(self.recipe, self.metric), results.values(self.reference, self.metric))


_CLEAN, _CORRUPTED = "clean accuracy", "corruption error"

STATEMENTS = (
    Statement(
        text="1. Training on adversarial images alone costs clean accuracy",
        recipe="adversarial",
        reference="vanilla",
        metric=_CLEAN,
        sign=-1,
    ),
    Statement(
        text="2. Fine-tuning that network on clean images recovers it",
        recipe="finetune",
        reference="adversarial",
        metric=_CLEAN,
        sign=1,
    ),
    Statement(
        text="3. A shared BatchNorm is worse than AdvProp on clean images",
        recipe="shared-bn",
        reference="advprop",
        metric=_CLEAN,
        sign=-1,
    ),
    Statement(
        text="4a. AdvProp improves clean accuracy",
        recipe="advprop",
        reference="vanilla",
        metric=_CLEAN,
        sign=1,
    ),
    Statement(
        text="4b. AdvProp reduces the corruption error",
        recipe="advprop",
        reference="vanilla",
        metric=_CORRUPTED,
        sign=-1,
    ),
)


def advice(results: Results) -> list[str]:
    """Return paragraphs for a reader who decides whether to train with AdvProp."""
    clean, corrupted = (statement.measure(results) for statement in STATEMENTS[-2:])
    if clean is None or corrupted is None:
        return ["Not decided: vanilla and AdvProp are not measured with a common seed yet."]
    paragraphs = [
        f"At this size, AdvProp changes the corruption error by {_points(corrupted)} and the clean accuracy by "
        f"{_points(clean)}, compared with vanilla training of as many epochs. {_recommendation(clean, corrupted)}",
        _at_equal_time(results),
        *_better_recipes(results),
    ]
    attacked = paired(results.values("advprop", "PGD ε = 4"), results.values("vanilla", "PGD ε = 4"))
    if attacked is not None:
        paragraphs.append(
            f"Under PGD-10 at ε = 4/255, the accuracy of AdvProp's main route differs by {_points(attacked)} from "
            "vanilla."
        )
    return paragraphs


def _points(difference: Difference) -> str:
    number, _, interval = str(difference).partition(" ")
    return f"{number} points {interval}"


def _at_equal_time(results: Results) -> str:
    clean, corrupted = (
        paired(results.values("advprop", metric), results.values(LONG, metric)) for metric in (_CLEAN, _CORRUPTED)
    )
    if clean is None or corrupted is None:
        return "Vanilla training with the same computing time is not measured yet."
    if corrupted.verdict(-1) is Verdict.REPRODUCED:
        conclusion = "So it is better under corruptions at equal computing time, too."
    elif clean.mean < 0 < corrupted.mean:
        conclusion = (
            "So longer vanilla training was the better use of the time. Train vanilla until it stops improving before "
            "you spend time on AdvProp."
        )
    else:
        conclusion = "So a gain under corruptions at equal computing time is not established."
    return (
        "An AdvProp epoch costs several vanilla epochs. Compared with vanilla training of as many passes over the "
        f"images (`{LONG}`), AdvProp changes the corruption error by {_points(corrupted)} and the clean accuracy by "
        f"{_points(clean)}. {conclusion}"
    )


def _better_recipes(results: Results) -> list[str]:
    """Return a sentence for each recipe whose means are better than AdvProp's in both metrics."""
    sentences = []
    for recipe in results.recipes():
        clean, corrupted = (
            paired(results.values(recipe, metric), results.values("advprop", metric)) for metric in (_CLEAN, _CORRUPTED)
        )
        if recipe != LONG and clean is not None and corrupted is not None and clean.mean > 0 > corrupted.mean:
            sentences.append(
                f"The means of `{recipe}` are better than those of AdvProp: clean accuracy by {_points(clean)}, "
                f"corruption error by {_points(corrupted)}."
            )
    return sentences


def _recommendation(clean: Difference, corrupted: Difference) -> str:
    better, safe = corrupted.verdict(-1), clean.verdict(1)
    if corrupted.half is None:
        return "One seed decides nothing."
    if better is Verdict.REPRODUCED:
        if safe is Verdict.NOT_REPRODUCED:
            return "Use it if corrupted images are what your network meets; it costs accuracy on clean ones."
        return (
            "Use it if your network meets corrupted images: the reduction is larger than the variation between seeds, "
            "and no loss of clean accuracy was found."
        )
    if better is Verdict.NOT_REPRODUCED:
        return "Do not use it with these settings: it makes corrupted images worse."
    if safe is Verdict.REPRODUCED:
        return "Use it for clean accuracy; a change under corruptions was not found."
    if safe is Verdict.NOT_REPRODUCED:
        return "Do not use it with these settings: it costs clean accuracy, without a gain under corruptions."
    if clean.mean > 0 > corrupted.mean:
        return "Both means favor AdvProp, but neither change is larger than the variation between seeds."
    return "Neither change is larger than the variation between seeds: these runs give no reason to use it."
