"""Tests of sanitised output: untrusted text on a terminal or in a log."""

import io
import logging
from collections.abc import Iterator

import pytest

from infra import logs
from infra.text import printable

FORGED = "a\x1b[2Jb\x9bc\u202ed\ne\rf\u2028g\ud800h\u2066i\u200fj"
ESCAPED = r"a\x1b[2Jb\x9bc\u202ed\ne\rf\u2028g\ud800h\u2066i\u200fj"


def test_printable_escapes_control_characters() -> None:
    assert printable(FORGED) == ESCAPED


def test_printable_keeps_normal_text() -> None:
    text = r"Grüße, 日本語 مرحبا 👩‍🚀 C:\new"
    assert printable(text) == text


@pytest.fixture
def log_output() -> Iterator[io.StringIO]:
    """Output of a foreign handler on the project's logger."""
    stream, logger = io.StringIO(), logging.getLogger("knn_diffusion")
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_get_sanitises_records_for_every_handler(log_output: io.StringIO) -> None:
    logs.get("test").warning("%s failed: %s", FORGED, OSError("https://u:hunter2@host/\n12:00:00 forged"))
    assert log_output.getvalue() == f"{ESCAPED} failed: https://u:***@host/\\n12:00:00 forged\n"


def test_setup_sanitises_lines_and_tracebacks_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.setup(verbose=True)
        try:
            raise ValueError("https://u:hunter2@host/ \x1b[2J")
        except ValueError:
            logging.getLogger("library").exception("got %s", "\x9b2J")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    output = capsys.readouterr().err
    assert r"got \x9b2J" in output
    assert r"ValueError: https://u:***@host/ \x1b[2J" in output
    assert "hunter2" not in output
    assert "\x1b" not in output
