"""Command-line option types that several commands share."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["BATCH_SIZES"]


class _BatchSizes(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`min:opt:max`, or one number for all three."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = [int(part) for part in str(value).split(":")]
            smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
        except ValueError:
            self.fail(f"expected MIN:OPT:MAX such as 1:8:32, or one number; found {value!r}", param, ctx)
        if not 1 <= smallest <= usual <= largest:
            self.fail(f"expected 1 ≤ min ≤ opt ≤ max; found {value!r}", param, ctx)
        return smallest, usual, largest


BATCH_SIZES = _BatchSizes()
