"""Former home of :mod:`model.encoder.clip`, for databases registered by version 0.1. Removed in 0.3."""

from model.encoder.clip import Encoder, encoder_for

__all__ = ["Encoder", "encoder_for"]
