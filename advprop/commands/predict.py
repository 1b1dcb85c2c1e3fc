"""`advprop predict`: classify image files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from runtime.errors import DataError
from runtime.loading import load
from runtime.session import Prediction, Session
from runtime.system.command import Command, batch_size_option, device_option, json_option, with_options
from runtime.system.console import clean, print_json, set_up_logging
from runtime.system.image_sources import image_paths

EXAMPLES = """
Examples:
  advprop predict model.fp16.onnx a.jpg b.png
  advprop predict model.onnx photos/ --top 5
  advprop predict model.onnx photos/ --json > answers.jsonl
"""


@click.command("predict", cls=Command, epilog=EXAMPLES)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", default=1, show_default=True, type=click.IntRange(min=1), help="Classes to list per image.")
@with_options(json_option("one JSON object per image"), batch_size_option(32), device_option())
def main(model: Path, images: tuple[Path, ...], top: int, as_json: bool, batch_size: int, device: str) -> None:
    """Classify IMAGES with the exported MODEL.

    IMAGES are files, or folders that are searched at any depth. MODEL is an ONNX file or an engine.
    """
    set_up_logging()
    paths = [path for given in images for path in (image_paths(given) if given.is_dir() else [given])]
    failed = 0
    with load(model, device=device) as session:
        for path, answer in _predict_each(session, paths, batch_size):
            if isinstance(answer, DataError):
                failed += 1
                click.echo(clean(f"skipped: {answer}"), err=True)
                continue
            ranked = [(label, probability) for label, probability, _ in answer.top(top)]
            if as_json:
                classes = [{"label": label, "probability": probability} for label, probability in ranked]
                print_json({"file": str(path), "classes": classes}, indent=None)
            else:
                listed = "  ".join(f"{label} {probability:.1%}" for label, probability in ranked)
                click.echo(clean(f"{path}  {listed}"))
    if failed:
        click.echo(f"error: {failed} of {len(paths)} images could not be decoded", err=True)
        sys.exit(DataError.exit_code)


def _predict_each(
    session: Session, paths: Sequence[Path], batch_size: int
) -> Iterator[tuple[Path, Prediction | DataError]]:
    """Yield the prediction of each image. If a batch fails to decode, predict its images singly."""
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        try:
            yield from zip(batch, session.predict(batch, batch_size=batch_size), strict=True)
        except DataError:
            for path in batch:
                try:
                    yield path, session.predict([path])[0]
                except DataError as error:
                    yield path, error


if __name__ == "__main__":
    main()
