"""Spans of OpenTelemetry for the server's requests, if its API is installed.

Without an SDK that exports them, spans cost nothing and go nowhere. `opentelemetry-instrument advprop
serve …` sets up an SDK from environment variables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from runtime.serve.errors import Outcome

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None

__all__ = ["RequestSpan", "request_span"]


class RequestSpan:
    """The span of one request. Attributes follow the semantic conventions of OpenTelemetry."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def end(self, name: str, outcome: Outcome, attributes: Mapping[str, str | int]) -> None:
        """Name the span, and describe how the request ended.

        Args:
            name: method and route.
            outcome: how the request ended.
            attributes: further attributes.
        """
        if self._span is None:
            return
        self._span.update_name(name)
        self._span.set_attributes({"advprop.outcome": outcome.label, **attributes})
        if outcome.http_status >= 500:
            self._span.set_status(trace.StatusCode.ERROR, outcome.label)


@contextmanager
def request_span(headers: Iterable[tuple[str, str]]) -> Iterator[RequestSpan]:
    """Record a request as a span, whose parent is the span in the client's headers.

    Args:
        headers: names in lower case, and values.
    """
    if trace is None:
        yield RequestSpan()
        return
    tracer = trace.get_tracer("advprop")
    parent = propagate.extract(dict(headers))
    with tracer.start_as_current_span(
        "request", parent, kind=trace.SpanKind.SERVER, record_exception=False, set_status_on_exception=False
    ) as span:
        yield RequestSpan(span)
