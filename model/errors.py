"""The error type of the models. One type, so that a caller can report it on one line."""


class ModelError(ValueError):
    """Raised when a model cannot use its input. The message states what is wrong, where, and how to fix it."""
