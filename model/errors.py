"""The error type of the models. One type, so that a caller can report it on one line."""


class ModelError(ValueError):
    """Raised for an invalid configuration of a model, or an input that it cannot use.

    The message states what is wrong, where, and how to fix it.
    """
