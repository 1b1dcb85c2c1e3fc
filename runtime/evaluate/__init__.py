"""Measure how accurate and robust classifiers are: test sets, corruptions, attacks and reports.

    from runtime.evaluate import RunConfig, SuiteConfig, evaluate, load_model

The names load when they are first used, so importing this package needs only NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.system.lazy import lazy_names

if TYPE_CHECKING:
    from runtime.evaluate.attacks.config import AttackConfig
    from runtime.evaluate.attacks.methods import Attacker, load_attacker
    from runtime.evaluate.attacks.run import AttackedModel, attack
    from runtime.evaluate.cells import SuiteConfig
    from runtime.evaluate.cluster import Cluster, ClusterConfig
    from runtime.evaluate.corruptions import corrupt
    from runtime.evaluate.models import Model, load_model, load_models, model_of
    from runtime.evaluate.report import check_outputs, write_report
    from runtime.evaluate.results import merge, read_result, result_path, write_result
    from runtime.evaluate.run import RunConfig, evaluate
    from runtime.evaluate.table import attack_notes, attack_table, result_notes, result_table

__all__ = [
    "AttackConfig",
    "AttackedModel",
    "Attacker",
    "Cluster",
    "ClusterConfig",
    "Model",
    "RunConfig",
    "SuiteConfig",
    "attack",
    "attack_notes",
    "attack_table",
    "check_outputs",
    "corrupt",
    "evaluate",
    "load_attacker",
    "load_model",
    "load_models",
    "merge",
    "model_of",
    "read_result",
    "result_notes",
    "result_path",
    "result_table",
    "write_report",
    "write_result",
]

_HOMES = {
    "attacks.config": ("AttackConfig",),
    "attacks.methods": ("Attacker", "load_attacker"),
    "attacks.run": ("AttackedModel", "attack"),
    "cells": ("SuiteConfig",),
    "cluster": ("Cluster", "ClusterConfig"),
    "corruptions": ("corrupt",),
    "models": ("Model", "load_model", "load_models", "model_of"),
    "report": ("check_outputs", "write_report"),
    "results": ("merge", "read_result", "result_path", "write_result"),
    "run": ("RunConfig", "evaluate"),
    "table": ("attack_notes", "attack_table", "result_notes", "result_table"),
}

__getattr__ = lazy_names(__name__, {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names})
