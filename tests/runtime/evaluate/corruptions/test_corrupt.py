"""`corrupt`: determinism, shapes, severities, and errors."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import runtime.evaluate.corruptions as package
from runtime.errors import BackendUnavailable, ConfigError, DataError
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS, TABLES, corrupt, table_for
from runtime.evaluate.corruptions.corrupt import DETERMINISTIC
from runtime.evaluate.corruptions.weather import frost_texture
from tests.support import ROOT

NAMES = (*CORRUPTIONS, *EXTRAS)
NOT_BY_DISTANCE = ("frost", "elastic_transform", "saturate", "spatter")
"""Their severities differ in kind: elastic_transform first moves the image, then bends it."""
KEEPS_BLACK = frozenset(NAMES) - {"gaussian_noise", "impulse_noise", "snow", "frost", "brightness", "spatter"}
"""Corruptions that leave a black image black: they add no light."""


def picture(height: int, width: int) -> np.ndarray:
    """Return an image with gradients, an edge and some texture, uint8 RGB."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    texture = 0.2 * np.random.default_rng(0).random((height, width))
    return (255 * np.stack([0.8 * x, 0.8 * y, (x > 0.4) * 0.6], axis=2) + 51 * texture[..., None]).astype(np.uint8)


def try_corrupt(image: np.ndarray, name: str, severity: int, **options: Any) -> np.ndarray:
    """Call `corrupt`; skip the test if the textures of frost are missing."""
    if name == "frost":
        try:
            frost_texture("frost1.png")
        except BackendUnavailable as error:
            pytest.skip(str(error))
    return corrupt(image, name, severity, **options)


def python(program: str, *arguments: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    command = [sys.executable, *arguments, "-c", program]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def bare_folder(folder: Path, *packages: str) -> str:
    """Return a PYTHONPATH with only these packages and ours."""
    import numpy

    site = Path(numpy.__file__).parent.parent
    for pattern in packages:
        for source in site.glob(pattern):
            (folder / source.name).symlink_to(source)
    return f"{folder}{os.pathsep}{ROOT}"


def legacy_state() -> np.ndarray:
    """Return a copy of the state of NumPy's global generator."""
    state: Any = np.random.get_state()
    return np.array(state[1])


def test_every_table_has_five_severities_of_all_nineteen_corruptions() -> None:
    assert len(CORRUPTIONS) == 15
    assert len(EXTRAS) == 4
    for table in TABLES.values():
        assert sorted(table) == sorted(NAMES)
        assert all(len(levels) == 5 for levels in table.values())
    assert all(len(TABLES["imagenet"][name][0]) == len(TABLES["cifar"][name][0]) for name in NAMES)


def test_exported_names_are_sorted_and_exist() -> None:
    assert list(package.__all__) == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_cells_do_not_depend_on_the_order_of_calls(name: str) -> None:
    image = picture(40, 36)
    before = image.copy()
    first = {
        (key, severity): try_corrupt(image, name, severity, key=key) for key in ("a", "b", 1) for severity in (1, 3, 5)
    }
    for (key, severity), result in reversed(first.items()):
        np.random.default_rng(5).random(3)
        assert np.array_equal(corrupt(image, name, severity, key=key), result)
    assert np.array_equal(image, before)
    random = name not in DETERMINISTIC
    assert np.array_equal(first["a", 5], first["b", 5]) != random
    assert np.array_equal(corrupt(image, name, 5, key="a", seed=1), first["a", 5]) != random
    assert first["a", 1].flags.writeable


def test_1_and_its_text_are_different_keys_and_numpys_global_state_is_unchanged() -> None:
    image = picture(32, 32)
    state = legacy_state()
    assert not np.array_equal(corrupt(image, "fog", 3, key=1), corrupt(image, "fog", 3, key="1"))
    assert np.array_equal(corrupt(image, "fog", 3, key=1), corrupt(image, "fog", 3, key=cast(int, np.int64(1))))
    assert np.array_equal(legacy_state(), state)


def test_cells_are_equal_in_another_process() -> None:
    program = (
        "import numpy, zlib; from runtime.evaluate.corruptions import corrupt\n"
        "image = (numpy.arange(3072) % 251).astype('uint8').reshape(32, 32, 3)\n"
        "print([zlib.crc32(corrupt(image, name, 4, key='ü/1')) for name in ('glass_blur', 'snow', 'shot_noise')])"
    )
    assert python(program, PYTHONHASHSEED="1") == python(program, PYTHONHASHSEED="2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (32, 32), (64, 64), (50, 83), (224, 224), (300, 211)])
def test_any_shape_at_all_severities(name: str, shape: tuple[int, int]) -> None:
    image = picture(*shape)
    for severity in range(1, 6):
        result = try_corrupt(image, name, severity)
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        assert min(shape) < 32 or not np.array_equal(result, image)


@pytest.mark.parametrize("name", ["frost", "fog", "snow", "zoom_blur"])
def test_an_image_larger_than_the_textures_is_corrupted_up_to_its_corners(name: str) -> None:
    image = picture(410, 720)
    result = try_corrupt(image, name, 3)
    changed = result != image
    for corner in (np.s_[:40, :40], np.s_[:40, -40:], np.s_[-40:, :40], np.s_[-40:, -40:]):
        assert changed[corner].any()
    assert changed.any(axis=2).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_a_black_image_stays_black_unless_light_is_added(name: str) -> None:
    """It also divides by no maximum of 0: warnings are errors."""
    result = try_corrupt(np.zeros((32, 32, 3), np.uint8), name, 3)
    assert (result.max() == 0) == (name in KEEPS_BLACK)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_BY_DISTANCE])
def test_severity_5_changes_the_image_more_than_severity_1(name: str, table: str) -> None:
    side = {"cifar": 32, "tiny": 64, "imagenet": 224}[table]
    image = picture(side, side)
    distance = [
        np.mean([np.abs(corrupt(image, name, level, key=key).astype(int) - image).mean() for key in range(4)])
        for level in (1, 5)
    ]
    assert distance[1] > distance[0] > 0


@pytest.mark.parametrize(
    ("side", "table"),
    [
        (1, "cifar"),
        (32, "cifar"),
        (45, "cifar"),
        (46, "tiny"),
        (64, "tiny"),
        (119, "tiny"),
        (120, "imagenet"),
        (224, "imagenet"),
        (600, "imagenet"),
    ],
)
def test_the_table_depends_on_the_shorter_side(side: int, table: str) -> None:
    assert table_for(side, side) == table_for(side, 999) == table_for(999, side) == table
    image = picture(side, side + 8)
    assert np.array_equal(corrupt(image, "contrast", 2), corrupt(image, "contrast", 2, table=table))
    other = "cifar" if table != "cifar" else "imagenet"
    assert not np.array_equal(corrupt(image, "contrast", 2), corrupt(image, "contrast", 2, table=other))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("fogg", 1), {}, "did you mean fog"),
        (("", 1), {}, "expected one of gaussian_noise"),
        ((None, 1), {}, "expected one of gaussian_noise"),
        (("fog", 0), {}, "1, 2, 3, 4 or 5; found 0"),
        (("fog", 6), {}, "found 6"),
        (("fog", 2.0), {}, "found 2.0"),
        (("fog", True), {}, "found True"),
        (("fog", 1), {"table": "imagenet64"}, "expected auto, cifar, tiny, imagenet"),
        (("fog", 1), {"key": 1.5}, "key .* found 1.5"),
        (("fog", 1), {"seed": "a"}, "seed .* found 'a'"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        corrupt(picture(32, 32), *arguments, **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "found float32"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        ([[0]], "found list"),
    ],
)
def test_invalid_images_are_refused(image: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        corrupt(image, "fog", 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_of_another_array_is_accepted(name: str) -> None:
    view = picture(40, 36)[::-1, ::-1]
    assert np.array_equal(try_corrupt(view, name, 2), corrupt(np.ascontiguousarray(view), name, 2))


def test_importing_loads_only_numpy(tmp_path: Path) -> None:
    program = (
        "import sys, runtime, runtime.evaluate, runtime.evaluate.corruptions\n"
        "print([name for name in ('cv2', 'scipy', 'PIL', 'imagecorruptions') if name in sys.modules])"
    )
    assert python(program) == "[]"
    assert python(program, "-S", PYTHONPATH=bare_folder(tmp_path, "numpy", "numpy.libs")) == "[]"


def test_missing_libraries_are_reported(tmp_path: Path) -> None:
    program = (
        "import numpy; from runtime.evaluate.corruptions import corrupt\n"
        "from runtime.errors import BackendUnavailable\n"
        "try: corrupt(numpy.zeros((9, 9, 3), 'uint8'), 'fog' if {0} else 'frost', 1)\n"
        "except BackendUnavailable as error: print(error)"
    )
    without = bare_folder(tmp_path, "numpy", "numpy.libs")
    assert "pip install opencv-python-headless" in python(program.format(0), "-S", PYTHONPATH=without)
    assert python(program.format(1), "-S", PYTHONPATH=without) == ""  # fog needs only NumPy
    with_opencv = bare_folder(tmp_path, "cv2", "opencv_python_headless.libs")
    message = python(program.format(0), "-S", PYTHONPATH=with_opencv)
    assert "pip install --no-deps imagecorruptions-imaug" in message
    assert "opencv-python-headless" in message
