"""Errors that a user can fix. Each message says what went wrong, where, and how to fix it.

KNNDiffusionError            base class; a command prints one line and exits with 1
├── ConfigError              a setting is invalid; also a ``ValueError``, as Prefect's forms expect
├── InputError               an input cannot be used: a URL list, a texts file, an image
├── NotFoundError            nothing has that name, URI or alias
├── IntegrityError           stored bytes differ from their committed digest
├── EncoderMismatchError     two artifacts come from different encoders
├── StageError               a stage could not produce its output
│   └── LeaseHeldError       another writer holds the lease on a folder
└── TransientError           a temporary failure of an external system: the only error that is retried
"""


class KNNDiffusionError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(KNNDiffusionError, ValueError):
    """Raised when a configuration is built from invalid values. Prefect shows the message next to the form."""


class InputError(KNNDiffusionError):
    """Raised when an input cannot be used."""


class NotFoundError(KNNDiffusionError):
    """Raised when nothing is stored or registered under a name."""


class IntegrityError(KNNDiffusionError):
    """Raised when stored bytes differ from their committed digest."""


class EncoderMismatchError(KNNDiffusionError):
    """Raised when artifacts from different encoders are combined."""


class StageError(KNNDiffusionError):
    """Raised when a stage cannot produce its output."""


class LeaseHeldError(StageError):
    """Raised when another writer holds the lease on a folder."""


class TransientError(KNNDiffusionError):
    """Raised for a temporary failure of an external system. Tasks retry this error and no other."""
