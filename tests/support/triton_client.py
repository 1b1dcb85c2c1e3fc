"""A program that sends requests with Triton's client, and prints the logits as hexadecimal bytes.

It runs in an environment of its own: `tritonclient` needs another protobuf than this project. It
receives the protocol (`http`, `grpc`, `aio-http` or `aio-grpc`), the address, the images' file
(`.npy`) and the file of an encoded image, and prints JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def client_module(protocol: str) -> Any:
    kind = protocol.removeprefix("aio-")
    return importlib.import_module(
        f"tritonclient.{kind}.aio" if protocol.startswith("aio-") else f"tritonclient.{kind}"
    )


async def finished(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def main(protocol: str, address: str, images_file: str, encoded_file: str) -> None:
    module = client_module(protocol)
    client = module.InferenceServerClient(address)
    images = np.load(images_file)
    found: dict[str, Any] = {
        "live": await finished(client.is_server_live()),
        "ready": await finished(client.is_server_ready()),
        "model_ready": await finished(client.is_model_ready("toy", "1")),
    }
    metadata = await finished(client.get_model_metadata("toy"))
    found["input"] = metadata["inputs"][0]["name"] if isinstance(metadata, dict) else metadata.inputs[0].name
    given = module.InferInput("input", list(images.shape), "FP32")
    for binary in (True, False) if protocol.endswith("http") else (True,):
        options = {"binary_data": binary} if protocol.endswith("http") else {}
        given.set_data_from_numpy(images, **options)
        answer = await finished(
            client.infer("toy", [given], request_id="7", outputs=[module.InferRequestedOutput("logits", **options)])
        )
        found[f"logits_{binary}"] = answer.as_numpy("logits").tobytes().hex()
    encoded = np.array([Path(encoded_file).read_bytes()], dtype=object)
    image = module.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(encoded)
    answer = await finished(client.infer("toy", [image]))
    found["label"] = answer.as_numpy("label")[0].decode()
    given.set_data_from_numpy(images)
    ranked = module.InferRequestedOutput("logits", class_count=1)
    answer = await finished(client.infer("toy", [given], outputs=[ranked], timeout=5_000_000))
    found["classification"] = answer.as_numpy("logits")[0][0].decode().split(":")[1:]
    try:
        await finished(client.infer("tay", [given]))
    except Exception as error:
        found["error"] = str(error)
    await finished(client.close())
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
