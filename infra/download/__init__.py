"""Guarded image downloads."""
