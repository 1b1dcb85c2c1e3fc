"""Serve a model over HTTP, with health checks, limits and deadlines. Uses only asyncio and a session.

    python examples/http_service.py model.onnx --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict    {"label": "tench", "probability": 0.93}
    curl http://127.0.0.1:8000/live                                200 as soon as the service listens
    curl http://127.0.0.1:8000/ready                               200 when the model is loaded and warm

Other status codes: 400 if the body is not an image, 413 if it is too large, 500 if the model failed, and 503 if the
service is overloaded or not ready (retry later). The service listens on 127.0.0.1 only. To expose it, put a proxy
with TLS, authentication and connection limits in front of it.
"""

import argparse
import asyncio
import contextlib
import json

import advprop

LARGEST_BODY = 20_000_000  # bytes
TIMEOUT_S = 10.0
session: advprop.Session | None = None


async def answer(method: str, path: str, body: bytes) -> tuple[int, object]:
    if path == "/live":
        return 200, "live"
    if session is None:
        return 503, "loading"
    if path == "/ready":
        return 200, "ready"
    if (method, path) != ("POST", "/predict"):
        return 404, "POST an image to /predict, or GET /live or /ready"
    try:
        (prediction,) = await session.apredict([body], timeout_s=TIMEOUT_S)
    except (advprop.errors.RequestNotServed, advprop.errors.SessionClosed) as error:
        return 503, str(error)
    except advprop.errors.InputError as error:
        return 400, str(error)
    except advprop.errors.AdvPropError as error:
        return 500, str(error)
    return 200, {"label": prediction.label, "probability": prediction.probability}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_S):  # the client may stop sending
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            method, path = head.split()[:2]
            length = int(head.partition("\ncontent-length:")[2].partition("\r")[0] or 0)
            if "100-continue" in head:  # curl waits for this before it sends more than 1 MB
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(length) if length <= LARGEST_BODY else None
        status, content = await answer(method.upper(), path, body) if body is not None else (413, "too large")
        data = json.dumps(content).encode()
        writer.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(data), data))
        await writer.drain()
    except (OSError, EOFError, ValueError, TimeoutError, asyncio.LimitOverrunError):
        pass  # the client does not speak HTTP, is too slow, or has disconnected
    finally:
        writer.close()


async def main(model: str, port: int, batching: advprop.Batching) -> None:
    global session
    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)
    print("listening on", server.sockets[0].getsockname()[1], flush=True)
    with await asyncio.to_thread(advprop.load, model, warm_up=(1, batching.max_batch), batching=batching) as session:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="ONNX file or engine")
    parser.add_argument("--port", type=int, default=8000, help="TCP port (default: 8000)")
    parser.add_argument("--max-queued", type=int, default=256, help="maximum number of waiting images (default: 256)")
    parser.add_argument("--max-batch", type=int, default=8, help="maximum images per batch (default: 8)")
    arguments = parser.parse_args()
    settings = advprop.Batching(max_batch=arguments.max_batch, max_queued_images=arguments.max_queued)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(arguments.model, arguments.port, settings))
