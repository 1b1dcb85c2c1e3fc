"""Serve a model from several processes with gunicorn. Each worker loads the model after the fork.

    pip install advprop gunicorn
    MODEL=model.onnx gunicorn --workers 2 --threads 8 examples.gunicorn_service:app
    curl --data-binary @photo.jpg http://127.0.0.1:8000/    {"label": "tench", "probability": 0.93}

Do not use --preload: threads of a loaded model do not survive a fork, and the session refuses to run.
"""

import json
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import runtime
from runtime.errors import InputError, RequestNotServed


@cache
def session() -> runtime.Session:
    return runtime.load(os.environ["MODEL"], threads=1, warm_up=(1,))


session()  # gunicorn imports this module in each worker; a worker is ready once the model is loaded


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    image = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    try:
        (best,) = session().submit_predict([image], timeout_s=10).result()  # threads share batches
        status, content = "200 OK", {"label": best.label, "probability": best.probability}
    except InputError as error:
        status, content = "400 Bad Request", {"error": str(error)}
    except RequestNotServed as error:
        status, content = "503 Service Unavailable", {"error": str(error)}
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(content).encode()]
