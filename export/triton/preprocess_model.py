"""Model of Triton's Python backend: encoded images → the input of the classifier.

It needs advprop in the server's Python: pip install advprop
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from runtime.errors import AdvPropError
from runtime.preprocessing import Preprocessor
from runtime.spec import ModelSpec


class TritonPythonModel:
    """Decodes, resizes, crops and normalizes images as the spec of the classifier describes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the spec, which is next to this file."""
        config = json.loads(args["model_config"])
        self._output = config["output"][0]["name"]
        spec = Path(args["model_repository"]) / args["model_version"] / "spec.json"
        self._preprocessor = Preprocessor.of(ModelSpec.from_json(spec.read_text(), where=str(spec)))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; an image that cannot be decoded fails only its own request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        images = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().reshape(-1)
        try:
            batch = self._preprocessor([bytes(image) for image in images])
        except AdvPropError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor(self._output, batch)])
