from typing import Any

import pytest

from calib.config import CalibrationConfig
from runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "best"}, "method must be one of auto, minmax, percentile, entropy, mse; found 'best'"),
        ({"leave": ("middle",)}, "expected kinds of layers from depthwise, gates, first, last; found 'middle'"),
        ({"images": 0}, "images must be at least 1; found 0"),
        ({"max_noise": 0.0}, "max_noise must be above 0 percent; found 0.0"),
        ({"budget": 101}, "budget must be 0 to 100 percentage points of top-1 accuracy; found 101"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        CalibrationConfig(**settings)
