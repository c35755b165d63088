"""The errors a user can meet. Each message says what went wrong, where, and the mend.

    KNNDiffusionError            everything below; the command prints one line and exits with 1
    ├── InputError               what was handed in cannot be used: a URL list, a texts file, a picture
    ├── NotFoundError            nothing under that name, URI or alias
    ├── IntegrityError           stored bytes differ from the digest they were committed with
    ├── EncoderMismatchError     two artifacts were made by different encoders
    ├── StageError               a stage could not produce its output
    └── TransientError           the outside world failed in a way that may pass: the only one that is retried

A configuration that cannot be right raises ``ValueError`` where it is built, which Prefect shows beside the form.
"""


class KNNDiffusionError(Exception):
    """Base of every error that is the user's to mend, not ours."""


class InputError(KNNDiffusionError):
    """What was handed in cannot be used."""


class NotFoundError(KNNDiffusionError):
    """Nothing is stored or registered under that name."""


class IntegrityError(KNNDiffusionError):
    """Stored bytes differ from the digest they were committed with."""


class EncoderMismatchError(KNNDiffusionError):
    """Two artifacts that should be joined come from different encoders."""


class StageError(KNNDiffusionError):
    """A stage could not produce its output."""


class TransientError(KNNDiffusionError):
    """A failure of the outside world that may pass; tasks retry it, and nothing else."""
