"""OpenTelemetry traces of HTTP requests, with the extra ``telemetry``."""

import os
from collections.abc import Callable

from fastapi import FastAPI

from infra.errors import ConfigError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Variables that turn traces on. The exporter reads them itself, and sends OTLP over HTTP."""
_UNTRACED = "livez,readyz,metrics"


def instrument(app: FastAPI) -> Callable[[], None]:
    """Trace the requests of ``app`` if an endpoint is set. Return a function that sends the last spans.

    Raises ``ConfigError`` if the extra is not installed.
    """
    endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"{endpoint} needs the extra: pip install 'knn-diffusion[telemetry]'") from error
    name = os.environ.get("OTEL_SERVICE_NAME", "knn-diffusion")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls=_UNTRACED)
    return provider.shutdown
