"""Stages: each a frozen config, a pure step that joins model and infra, and a thin Prefect task."""
