"""What the models refuse. One type, so that a caller can print it as one line."""


class ModelError(ValueError):
    """Input that no model can serve: its message says what, where and the mend."""
