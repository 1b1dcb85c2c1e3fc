import pytest

from runtime import ImageSizes
from runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("224", ImageSizes((224, 224), (224, 224), (224, 224))),
        ("256x320", ImageSizes((256, 320), (256, 320), (256, 320))),
        ("160:224:320", ImageSizes((160, 160), (224, 224), (320, 320))),
        ("64x96:128X96:128x256", ImageSizes((64, 96), (128, 96), (128, 256))),
    ],
)
def test_sizes_are_read_and_written(text: str, sizes: ImageSizes) -> None:
    assert ImageSizes.parse(text) == sizes == ImageSizes.parse(str(sizes))
    assert sizes.fixed == (":" not in text)


@pytest.mark.parametrize("text", ["", "big", "1:2", "0", "-5", "320:224:160", "64x", "64:64x32:64", "100000"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"image sizes? .*found"):
        ImageSizes.parse(text)
