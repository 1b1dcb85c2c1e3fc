"""Embed a model in a FastAPI application. For a complete server, run `advprop serve`.

pip install advprop fastapi uvicorn
MODEL=model.onnx uvicorn examples.fastapi_service:app
curl --data-binary @photo.jpg http://127.0.0.1:8000/predict    {"label": "tench", "probability": 0.93}
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

import runtime
from runtime.errors import InputError, RequestNotServed


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with runtime.load(os.environ["MODEL"], warm_up=(1, 8)) as app.state.session:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict(request: Request) -> dict[str, object]:
    (best,) = await request.app.state.session.apredict([await request.body()], timeout_s=10)
    return {"label": best.label, "probability": best.probability}


@app.exception_handler(InputError)
async def not_an_image(request: Request, error: InputError) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=400)


@app.exception_handler(RequestNotServed)
async def overloaded(request: Request, error: RequestNotServed) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=503, headers={"Retry-After": "1"})
