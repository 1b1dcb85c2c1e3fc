"""All corruptions against outputs of the original code: 224 pixels, severities 1, 3 and 5, two images."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from corruptions import IMAGES, SEVERITIES, compare

from runtime.errors import BackendUnavailable
from runtime.evaluate.corruptions import CORRUPTIONS, corrupt
from runtime.evaluate.corruptions.corrupt import FIXED
from runtime.evaluate.corruptions.frost import _file
from tests.support import SHARED_DATA

REFERENCE = SHARED_DATA / "corruptions_ref.npz"
PIXELWISE = ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur")
"""Each pixel draws for itself, so one image averages thousands of draws."""
AT_ONCE = ("motion_blur", "snow", "frost", "fog", "elastic_transform")
"""A few draws change the whole image: one draw of the original is as far from its next as from ours."""


@pytest.fixture(scope="module")
def reference() -> Iterator[Mapping[str, np.ndarray]]:
    if not REFERENCE.is_file():
        pytest.skip(f"needs {REFERENCE.name} of the data folder beside the checkout, which is not here")
    with np.load(REFERENCE) as stored:
        yield {name: stored[name] for name in stored.files}


def skip_without_textures(name: str) -> None:
    if name == "frost":
        try:
            _file("frost1.png")
        except BackendUnavailable as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_cells_are_those_of_the_original(reference: Mapping[str, np.ndarray], name: str, severity: int) -> None:
    skip_without_textures(name)
    cell = compare(reference, name, severity)
    if name != "impulse_noise":  # its draws are not known
        # OpenCV 4 interpolates at 32 places between two pixels, OpenCV 5 everywhere.
        assert cell["levels"] <= (3 if name == "elastic_transform" else 1)
        assert cell["replay"][0] == pytest.approx(1, abs=0.03)
        assert cell["replay"][1] == pytest.approx(1, abs=0.05)
    if name in PIXELWISE:
        assert cell["own"][0] == pytest.approx(1, abs=0.03)
        assert cell["own"][1] == pytest.approx(1, abs=0.05)
    assert (name in FIXED) == (name not in PIXELWISE + AT_ONCE)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", AT_ONCE)
def test_the_originals_draw_could_be_one_of_ours(reference: Mapping[str, np.ndarray], name: str, severity: int) -> None:
    skip_without_textures(name)
    for j in IMAGES:
        clean = reference[f"clean/{j}"].astype(int)
        ours = [np.abs(corrupt(reference[f"clean/{j}"], name, severity, key=key) - clean).mean() for key in range(16)]
        theirs = np.abs(reference[f"{name}/{severity}/{j}"] - clean).mean()
        assert abs(theirs - np.mean(ours)) < 4 * np.std(ours, ddof=1)
