"""`advprop serve`: serve models over HTTP and gRPC."""

from __future__ import annotations

import logging
from typing import Any

import click

from runtime.backends.open import BACKENDS
from runtime.backends.options import EngineOptions, Threads
from runtime.batching.batcher import Batching
from runtime.errors import ConfigError
from runtime.serve.config import LoadSettings, ModelSource, ServeConfig
from runtime.system.command import Command, Option, as_config, device_option, threads_option
from runtime.system.console import set_up_logging
from runtime.system.decode import MAX_PIXELS

EXAMPLES = """
Examples:
  advprop serve model.onnx
  advprop serve flowers=model.fp16.engine birds=models/birds --grpc-port 8001 --watch
  advprop serve model.onnx --workers 4 --threads 1 --access-log
  curl --data-binary @photo.jpg 'http://127.0.0.1:8000/predict?top_k=5'
"""

log = logging.getLogger(__name__)

_MIB = 2**20
_WATCH_S = 2.0
_LOAD, _LIMITS, _BATCHING = "Models", "Limits", "Batching"
_BATCHES, _ENGINE, _THREADS = Batching(), EngineOptions(), Threads()
_POSITIVE = click.FloatRange(min=0, min_open=True)


def _option(*names: str, **attributes: Any) -> Option:
    return Option(list(names), show_default="default" in attributes, **attributes)


_OPTIONS = (
    _option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 listens on all interfaces."),
    _option("--http-port", default=8000, type=click.IntRange(0, 65535), help="Port for HTTP; 0 picks a free one."),
    _option("--grpc-port", default=0, type=click.IntRange(-1, 65535), help="Port for gRPC; 0: off, -1: a free one."),
    _option("--workers", default=1, type=click.IntRange(min=1), help="Processes. Each loads all models."),
    _option("--watch", is_flag=True, help=f"Load changed model files; checks every {_WATCH_S:g} seconds."),
    _option(
        "--drain-s", default=30.0, type=click.FloatRange(min=0), help="Seconds for requests in flight after SIGTERM."
    ),
    _option("--access-log", is_flag=True, help="Print one JSON object per request to stdout."),
    _option("--backend", default="auto", type=click.Choice(BACKENDS), group=_LOAD, help="What runs the models."),
    device_option(group=_LOAD),
    threads_option(group=_LOAD),
    _option(
        "--contexts",
        default=0,
        type=click.IntRange(min=0),
        group=_LOAD,
        help="Batches that run at the same time; 0 is 2 for an engine, and 1 for an ONNX file.",
    ),
    _option(
        "--max-batch",
        default=0,
        type=click.IntRange(min=0),
        group=_BATCHING,
        help="Maximum images per batch; 0 is 32 on a GPU, 4 on a CPU, and 1 on a CPU with several contexts.",
    ),
    _option(
        "--max-delay-us",
        type=click.IntRange(min=0),
        group=_BATCHING,
        help="Microseconds that a request waits for others while idle; the default is 1000 on a GPU, and 0 on a CPU.",
    ),
    _option(
        "--max-queued",
        default=_BATCHES.max_queued_images,
        type=click.IntRange(min=1),
        group=_BATCHING,
        help="Maximum number of waiting images per model; more are answered with 503.",
    ),
    _option(
        "--decode-threads",
        default=_BATCHES.decode_threads,
        type=click.IntRange(min=1),
        group=_BATCHING,
        help="Threads that decode images, per model.",
    ),
    _option("--timeout-s", default=60.0, type=_POSITIVE, group=_LIMITS, help="Maximum seconds per request."),
    _option("--max-body-mib", default=64.0, type=_POSITIVE, group=_LIMITS, help="Maximum size of a request, in MiB."),
    _option(
        "--max-pixels", default=MAX_PIXELS, type=click.IntRange(min=1), group=_LIMITS, help="Maximum pixels per image."
    ),
    _option(
        "--receive-s",
        default=30.0,
        type=_POSITIVE,
        group=_LIMITS,
        help="Seconds in which a client must send its headers, and then its body.",
    ),
)


def _settings(given: dict[str, Any]) -> ServeConfig:
    """Return a configuration without models."""
    load = LoadSettings(
        backend=given["backend"],
        device=given["device"],
        threads=Threads(intra=given["threads"], contexts=given["contexts"] or _THREADS.contexts),
        batching=Batching(
            max_batch=given["max_batch"],
            max_delay_us=given["max_delay_us"],
            max_queued_images=given["max_queued"],
            decode_threads=given["decode_threads"],
        ),
        engine=EngineOptions(contexts=given["contexts"] or _ENGINE.contexts),
        max_pixels=given["max_pixels"],
    )
    ports = {0: None, -1: 0}
    return ServeConfig(
        models=given["models"],
        host=given["host"],
        http_port=given["http_port"],
        grpc_port=ports.get(given["grpc_port"], given["grpc_port"]),
        load=load,
        drain_s=given["drain_s"],
        watch_s=_WATCH_S if given["watch"] else 0.0,
        workers=given["workers"],
        timeout_s=given["timeout_s"],
        max_body_bytes=max(1, round(given["max_body_mib"] * _MIB)),
        receive_s=given["receive_s"],
        access_log=given["access_log"],
    )


class _Source(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`FILE` or `NAME=FILE`."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ModelSource:
        if isinstance(value, ModelSource):
            return value
        try:
            return ModelSource.parse(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command("serve", cls=Command, epilog=EXAMPLES)
@click.argument("models", nargs=-1, required=True, type=_Source(), metavar="MODEL...")
@as_config("settings", _OPTIONS, dict)
def main(models: tuple[ModelSource, ...], settings: dict[str, Any]) -> None:
    """Serve each MODEL over HTTP and gRPC, with the Open Inference Protocol v2.

    MODEL is FILE or NAME=FILE: an ONNX file, an engine, the folder of an export, or a folder of
    numbered versions (1/, 2/, …). SIGTERM stops the server once its requests are answered.
    """
    set_up_logging()
    config = _settings({**settings, "models": models})
    from runtime.serve.workers import serve

    if not config.is_local:
        log.warning(
            "anybody who can reach %s can send requests and unload models: put TLS and authentication in front of it",
            config.host,
        )

    def announce(listening: Any) -> None:
        addresses = listening.http if listening.grpc is None else f"{listening.http} and gRPC on {listening.grpc}"
        click.echo(f"ready: {', '.join(model.name for model in models)} on {addresses}", err=True)

    serve(config, announce)


if __name__ == "__main__":
    main()
