"""Serve a model with Ray Serve.

    pip install advprop 'ray[serve]'
    MODEL=/models/model.onnx serve run examples.ray_serve:app
    curl --data-binary @photo.jpg http://127.0.0.1:8000/    {"label": "tench", "probability": 0.93}

Without `@serve.batch`: the session forms batches itself, and starts one as soon as the model is idle.
"""

import os

import ray.serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import runtime
from runtime.errors import InputError, RequestNotServed


@ray.serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Classifier:
    def __init__(self, model: str) -> None:
        self.session = runtime.load(model, threads=1, warm_up=(1, 8))

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            (best,) = await self.session.apredict([await request.body()], timeout_s=10)
        except InputError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        except RequestNotServed as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        return JSONResponse({"label": best.label, "probability": best.probability})


app = Classifier.bind(os.environ["MODEL"])  # type: ignore[attr-defined]  # the decorator adds it
