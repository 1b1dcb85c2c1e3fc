"""`limited_protocol`, HTTP connections with limits for the size and the time of headers."""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["limited_protocol"]

_FIRST_REQUEST_S = 0.5
"""When the server stops, a connection without a request so far is closed after this time."""


def limited_protocol(max_header_bytes: int, receive_s: float) -> type[asyncio.Protocol]:
    """Return a protocol for uvicorn.

    Args:
        max_header_bytes: maximum size of a request's line and headers; larger ones are answered
            with 431.
        receive_s: seconds from the first byte of a request, or from the connection, to the end of
            its headers. Slower connections are closed.
    """

    limits = {"max_header_bytes": max_header_bytes, "receive_s": receive_s}
    return type("LimitedProtocol", (_LimitedProtocol,), limits)


class _LimitedProtocol(HttpToolsProtocol):
    max_header_bytes = 0
    receive_s = 0.0
    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0
    _is_too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._head_bytes
        super().data_received(data)
        if self._in_head and self.transport is not None and not self.transport.is_closing():
            self._head_bytes = before + len(data)  # the parser reports a header once it is complete
            self._check_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def shutdown(self) -> None:
        """Close the connection once its request is answered; a new one gets a moment to send it."""
        if self.cycle is None:
            self.loop.call_later(_FIRST_REQUEST_S, self._close_if_unused)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        status, text = b"400 Bad Request", msg
        if self._is_too_large:
            status = b"431 Request Header Fields Too Large"
            text = f"the headers exceed the limit of {self.max_header_bytes} bytes"
        body = json.dumps({"error": text}).encode()
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (status, len(body), body)
        )
        self.transport.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.max_header_bytes:
            self._is_too_large = True
            raise ValueError("the headers are too large")  # ends in send_400_response

    def _check_head(self) -> None:
        if self._head_bytes > self.max_header_bytes:
            self._is_too_large = True
            self.send_400_response("")

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.receive_s, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_if_unused(self) -> None:
        if self.cycle is None:
            self._close()
        else:
            super().shutdown()

    def _close(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
