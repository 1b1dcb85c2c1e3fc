"""Which of a model's classes a folder's name, or a number, stands for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from runtime.errors import DataError, SpecError, nearest
from runtime.evaluate.class_lists import CIFAR10
from runtime.spec import ModelSpec

__all__ = ["among", "by_cifar_number", "by_folder", "by_imagenet_number"]

_WNID = re.compile(r"n\d{8}")


def by_folder(names: Iterable[str], spec: ModelSpec, where: str) -> dict[str, int]:
    """Finds the classes of folders that are called by WordNet ids or class names.

    Args:
        names: of the folders.
        spec: the model's classes.
        where: the folder they are in, for messages.

    Returns:
        Folder → class, of those folders that the model has a class for.

    Raises:
        DataError: there is none, or a name that several classes have.
    """
    names = sorted(names)
    wnids = {wnid: place for place, wnid in enumerate(spec.wnids)}
    classes = {name: place for place, name in enumerate(spec.classes)}
    found = {name: wnids.get(name, classes.get(name, -1)) for name in names}
    known = {name: place for name, place in found.items() if place >= 0}
    if not known:
        raise DataError(_none_known(names, spec, where))
    doubled = {name for name, number in Counter(spec.classes).items() if number > 1}
    unclear = sorted(name for name in known if name in doubled and name not in wnids)
    if unclear:
        raise DataError(
            f"{where}: the model has several classes called {unclear[0]!r}; call the folders by WordNet ids"
        )
    return known


def _none_known(names: list[str], spec: ModelSpec, where: str) -> str:
    if not names:
        return f"{where}: expected CLASS/IMAGE files; found no folders in it"
    inner = next((name for name in ("val", "test", "validation") if name in names), None)
    if inner:
        return f"{where}: expected CLASS/IMAGE files; found {', '.join(names[:4])}. Give {where}/{inner}"
    if all(_WNID.fullmatch(name) for name in names) and not spec.wnids:
        return (
            f"{where}: the folders are WordNet ids ({names[0]}, …), which the model does not know: its classes are "
            f"{_few(spec.classes)}. Call the folders by those names, or evaluate a model trained on such folders"
        )
    hint = nearest(names[0], (*spec.classes, *spec.wnids), 1)
    expected = _few(spec.classes) + (f", or {_few(spec.wnids)}" if spec.wnids else "")
    return f"{where}: expected folders called as the model's classes ({expected}); found {_few(names)}. {hint}".rstrip()


def by_imagenet_number(names: Iterable[str], spec: ModelSpec, where: str) -> dict[str, int]:
    """Finds the classes of folders that are called 0 to 999, as ImageNet-V2's are: numbers, so 10 comes after 9.

    Raises:
        DataError: a folder that is no number, or none.
        SpecError: the model's classes are not ImageNet's 1,000 in their order.
    """
    names = list(names)
    wrong = [name for name in names if not (name.isascii() and name.isdecimal() and int(name) < 1000)]
    if wrong or not names:
        raise DataError(
            f"{where}: expected folders called 0 to 999, as ImageNet-V2 has them; found "
            f"{_few(sorted(wrong)) if wrong else 'none'}. Folders of WordNet ids are for --suite imagenet"
        )
    if not _is_imagenet(spec):
        raise SpecError(
            f"folders called by numbers need a model of ImageNet's 1,000 classes in the order of their WordNet ids; "
            f"found {len(spec.classes)} classes ({_few(spec.wnids or spec.classes)})"
        )
    return {name: int(name) for name in names}


def by_cifar_number(numbers: Iterable[int], spec: ModelSpec, where: str) -> dict[int, int]:
    """Finds the classes of CIFAR-10's label numbers, by their names.

    Raises:
        DataError: a number above 9.
        SpecError: the model does not have CIFAR-10's classes.
    """
    numbers = sorted(set(numbers))
    if not numbers or numbers[0] < 0 or numbers[-1] >= len(CIFAR10):
        raise DataError(f"{where}: expected CIFAR-10's labels, 0 to 9; found {_few(map(str, numbers)) or 'none'}")
    places = {name: place for place, name in enumerate(spec.classes)}
    if set(CIFAR10) <= set(places):
        return {number: places[CIFAR10[number]] for number in numbers}
    if list(spec.classes) in ([f"class {number}" for number in range(10)], [str(number) for number in range(10)]):
        return {number: number for number in numbers}
    missing = [name for name in CIFAR10 if name not in places]
    raise SpecError(
        f"CIFAR-10's labels need a model with its classes ({_few(CIFAR10)}); found {_few(spec.classes)}, without "
        f"{_few(missing)}"
    )


def among(
    names: Iterable[str], chosen: Mapping[str, int], spec: ModelSpec, where: str
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Finds the 200 classes of ImageNet-A or -R among the model's, and those of the folders.

    Args:
        names: of the folders; those of other classes are left out.
        chosen: WordNet id → place among ImageNet's 1,000 classes, of the 200.
        spec: the model's classes.
        where: the folder they are in, for messages.

    Returns:
        Folder → class, and all 200 classes in the model's order.

    Raises:
        DataError: no folder is called by one of the WordNet ids.
        SpecError: the model lacks one of the 200.
    """
    places = {wnid: place for place, wnid in enumerate(spec.wnids)}
    if not places and _is_imagenet(spec):
        places = dict(chosen)
    missing = [wnid for wnid in chosen if wnid not in places]
    if missing:
        raise SpecError(
            f"this set asks which of 200 of ImageNet's classes an image is, and the model, of {len(spec.classes)} "
            f"classes, lacks {len(missing)} of them ({_few(missing)}); it needs a model of ImageNet's 1,000 classes"
        )
    names = sorted(names)
    known = {name: places[name] for name in names if name in chosen}
    if not known:
        raise DataError(
            f"{where}: expected folders called by the WordNet ids of the 200 classes ({_few(chosen)}); found "
            f"{_few(names) or 'no folders'}"
        )
    return known, tuple(sorted(places[wnid] for wnid in chosen))


def _is_imagenet(spec: ModelSpec) -> bool:
    """Whether the classes are ImageNet's, in the usual order, which is that of the WordNet ids."""
    return len(spec.classes) == 1000 and (not spec.wnids or list(spec.wnids) == sorted(spec.wnids))


def _few(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f", … ({len(listed)})" if len(listed) > most else "")
