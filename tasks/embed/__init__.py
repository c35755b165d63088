"""Embedding stage."""
