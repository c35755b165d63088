"""Mask-free image editing."""
