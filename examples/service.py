"""Serve a model over HTTP, in as few lines as possible. http_service.py adds health checks and limits.

python examples/service.py model.onnx 8000
curl --data-binary @photo.jpg http://127.0.0.1:8000/    {"label": "tench", "probability": 0.93}
"""

import asyncio
import json
import sys

import advprop


async def serve(session: advprop.Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    if "100-continue" in head:  # curl waits for this before it sends more than 1 MB
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    image = await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
    try:
        (best,) = await session.apredict([image], timeout_s=10)  # shares a batch with other requests
        status, content = 200, {"label": best.label, "probability": best.probability}
    except advprop.errors.InputError as error:  # not an image
        status, content = 400, {"error": str(error)}
    except advprop.errors.RequestNotServed as error:  # the queue is full, or the deadline passed
        status, content = 503, {"error": str(error)}
    data = json.dumps(content).encode()
    writer.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(data), data))
    await writer.drain()
    writer.close()


async def main(model: str, port: str) -> None:
    with advprop.load(model, warm_up=(1, 8), batching=advprop.Batching(max_queued_images=1000)) as session:
        server = await asyncio.start_server(lambda *streams: serve(session, *streams), "127.0.0.1", port, backlog=1000)
        print("listening on", server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
