"""Former home of :mod:`tasks.references.types`, for databases registered by version 0.1. Removed in 0.3."""

from tasks.references.types import DatabaseVersion

__all__ = ["DatabaseVersion"]
