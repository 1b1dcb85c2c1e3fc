"""Griffe extension of the documentation site: signatures show the default of a setting, not its range."""

from __future__ import annotations

from typing import Any

import griffe


class SettingDefaults(griffe.Extension):
    """Replaces `epsilon: float = setting(1.0, above=0, …)` by `epsilon: float = 1.0`."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Change the value of one attribute."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and value.canonical_path.rpartition(".")[2] == "setting":
            default = next((one for one in value.arguments if not isinstance(one, griffe.ExprKeyword)), None)
            attr.value = default
