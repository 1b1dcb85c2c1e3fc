"""Serve a session of ours with the KServe SDK.

Arguments: NAME MODEL.onnx PORT THREADS CONTEXTS MAX_BATCH.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import kserve
from kserve import InferOutput, InferRequest, InferResponse

import runtime


class Classifier(kserve.Model):  # type: ignore[misc]  # kserve has no types
    def __init__(self, name: str, path: str, threads: runtime.Threads, max_batch: int) -> None:
        super().__init__(name)
        batching = runtime.Batching(max_batch=max_batch, max_queued_images=1024)
        self.session = runtime.load(path, threads=threads, warm_up=(1,), batching=batching)
        self.ready = True

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        logits = await self.session.arun(payload.inputs[0].as_numpy())
        output = InferOutput(self.session.backend.outputs[0].name, list(logits.shape), "FP32")
        output.set_data_from_numpy(logits, binary_data=True)
        return InferResponse(payload.id or "0", self.name, [output])


if __name__ == "__main__":
    name, path, port, threads, contexts, max_batch = sys.argv[1:]
    server = kserve.ModelServer(http_port=int(port), workers=1, enable_grpc=False, access_log_format=None)
    for logger in ("kserve.trace", "uvicorn.access"):  # one line each for every request
        logging.getLogger(logger).setLevel(logging.WARNING)
    server.start([Classifier(name, path, runtime.Threads(intra=int(threads), contexts=int(contexts)), int(max_batch))])
