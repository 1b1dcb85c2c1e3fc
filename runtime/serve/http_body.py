"""Read the body of an HTTP request within limits, and notice that the client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

import numpy as np
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from runtime.serve.errors import Outcome, RequestError
from runtime.serve.state import ServerState

__all__ = ["read_body", "split_parts", "unless_disconnected"]

_Result = TypeVar("_Result")
_ALIGNMENT = 64
_MAX_PARTS = 256


@asynccontextmanager
async def read_body(request: Request, state: ServerState, *, align_at: int = 0) -> AsyncIterator[memoryview]:
    """Read a body, and reserve memory for it inside the context.

    Args:
        request: the request.
        state: the server, whose settings limit size and time.
        align_at: offset in the body at which tensors start, which are aligned in memory.

    Raises:
        RequestError: the body is too large, too slow, compressed, or the client left.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(Outcome.WRONG_MEDIA, f"found Content-Encoding {encoding[:60]!r}, expected none")
    limit = state.config.max_body_bytes
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limit:
        raise RequestError(Outcome.TOO_LARGE, f"the body has {int(declared)} bytes; the limit is {limit} bytes")
    with ExitStack() as reserved:
        if declared is not None:
            reserved.enter_context(state.memory_for(int(declared)))
        try:
            async with asyncio.timeout(state.config.receive_s):
                if declared is not None:
                    body = await _read_known(request, int(declared), align_at)
                else:
                    body = await _read_chunked(request, state, reserved)
        except TimeoutError:
            raise RequestError(
                Outcome.SLOW_CLIENT, f"the body did not arrive within {state.config.receive_s:g} s"
            ) from None
        except ClientDisconnect:
            raise RequestError(Outcome.CANCELLED, "the client disconnected") from None
        yield body


async def _read_known(request: Request, size: int, align_at: int) -> memoryview:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -(memory.ctypes.data + align_at) % _ALIGNMENT
    body = memory[start : start + size].data
    position = 0
    async for chunk in request.stream():
        body[position : position + len(chunk)] = chunk  # the HTTP parser ends a body at its declared size
        position += len(chunk)
    return body[:position]


async def _read_chunked(request: Request, state: ServerState, reserved: ExitStack) -> memoryview:
    limit, size = state.config.max_body_bytes, 0
    chunks = []
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise RequestError(Outcome.TOO_LARGE, f"the body has over {size} bytes; the limit is {limit} bytes")
        reserved.enter_context(state.memory_for(len(chunk)))
        chunks.append(chunk)
    return memoryview(b"".join(chunks))


async def split_parts(request: Request, body: memoryview) -> list[bytes]:
    """Return the parts of a multipart body, files or fields.

    Raises:
        RequestError: the body is not multipart, or has too many parts.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield bytes(body)

    parser = MultiPartParser(
        request.headers, stream(), max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=len(body) + 1
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise RequestError(Outcome.INVALID, f"the body is not multipart/form-data: {str(error)[:100]}") from error
    try:
        values = [value for _, value in form.multi_items()]
        return [value.encode() if isinstance(value, str) else await value.read() for value in values]
    finally:
        await form.close()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await `work`, and cancel it when the client disconnects.

    Raises:
        RequestError: the client disconnected.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestError(Outcome.CANCELLED, "the client disconnected")
    finally:
        task.cancel()
        left.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
