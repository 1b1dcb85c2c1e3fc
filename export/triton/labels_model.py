"""Model of Triton's Python backend: outputs of the classifier → labels and probabilities.

It needs advprop in the server's Python: pip install advprop
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from runtime.prediction import predictions_of
from runtime.spec import ModelSpec


class TritonPythonModel:
    """Returns the most probable classes of each image."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the spec, which is next to this file, and the number of classes to return."""
        config = json.loads(args["model_config"])
        self._inputs = [entry["name"] for entry in config["input"]]
        self._count = int(config["parameters"]["top_k"]["string_value"])
        spec = Path(args["model_repository"]) / args["model_version"] / "spec.json"
        self._spec = ModelSpec.from_json(spec.read_text(), where=str(spec))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        outputs = tuple(pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs)
        labels, probabilities = [], []
        for prediction in predictions_of(outputs, self._spec):
            best = prediction.top(self._count)
            labels.append([ranked.label.encode() for ranked in best])
            probabilities.append([ranked.probability for ranked in best])
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("LABEL", np.array(labels, np.object_)),
                pb_utils.Tensor("PROBABILITY", np.array(probabilities, np.float32)),
            ]
        )
