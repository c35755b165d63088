"""Error classes: the outcome of a download as one word."""

import re

_URL_ERRORS = (
    "invalid_url",
    "blocked_scheme",
    "blocked_address",
    "dns_error",
    "too_many_redirects",
    "robots_disallowed",
)
_TRANSFER_ERRORS = ("connection_error", "timeout", "deadline_exceeded", "body_too_large", "empty_body")
_IMAGE_ERRORS = (
    "not_an_image",
    "unsupported_format",
    "decode_error",
    "too_small",
    "too_many_pixels",
    "too_many_scans",
    "animated",
)
_DECODER_ERRORS = ("decode_timeout", "decode_memory", "decoder_died")
ERROR_CLASSES = frozenset(
    {"success", *_URL_ERRORS, *_TRANSFER_ERRORS, *_IMAGE_ERRORS, *_DECODER_ERRORS, "internal_error"}
)
"""Every outcome of a row's download, in addition to ``http_404`` and other HTTP statuses.

Rows whose image was dropped afterwards have the classes of ``infra.formats.webdataset`` in the same column.
"""


# Messages of urllib and img2dataset that do not start with an error class; the first match counts.
_MESSAGE_PATTERNS = (
    (r"^HTTP Error 30\d: The HTTP server returned a redirect error", "too_many_redirects"),
    (r"^HTTP Error (\d{3})", r"http_\1"),
    (r"^Use of image disallowed by X-Robots-Tag", "robots_disallowed"),
    (r"^<urlopen error unknown url type", "blocked_scheme"),
    (
        r"^unknown url type|no host given|nonnumeric port|control characters|codec can't|codec failed|IPv6",
        "invalid_url",
    ),
    (r"Name or service not known|name resolution|No address associated|getaddrinfo failed", "dns_error"),
    (r"timed out", "timeout"),
    (r"^<urlopen error|Remote end closed|IncompleteRead|Connection|\[SSL", "connection_error"),
    (r"^Image decoding error", "decode_error"),
    (r"^image too small", "too_small"),
)


def classify_outcome(status: str, error_message: str | None) -> str:
    """Return the error class of a row: the class that its message starts with, or the one that the message implies.

    Args:
        status: img2dataset's status, "success" for a downloaded image.
        error_message: img2dataset's error message, None for a downloaded image.
    """
    if status == "success":
        return "success"
    message = error_message or ""
    head = message.partition(":")[0]
    if head in ERROR_CLASSES or re.fullmatch(r"http_\d{3}", head):
        return head
    for pattern, error_class in _MESSAGE_PATTERNS:
        if found := re.search(pattern, message):
            return found.expand(error_class)
    return "internal_error"
