"""Prefect flows: what runs after what. They order; they do not compute."""
