"""Former home of :mod:`tasks.references.database`, for databases registered by version 0.1. Removed in 0.3."""

from tasks.references.database import open_database

__all__ = ["open_database"]
