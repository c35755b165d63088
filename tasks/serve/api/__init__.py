"""The HTTP API of the service: REST routes, an OpenAI-compatible adapter, probes and metrics."""
