"""Text from outside on its way to a terminal or a log."""

import io
import logging
from collections.abc import Iterator

import pytest

from infra import logs
from infra.text import printable

FORGED = "a\x1b[2Jb\x9bc\u202ed\ne\rf\u2028g\ud800h\u2066i\u200fj"
SHOWN = r"a\x1b[2Jb\x9bc\u202ed\ne\rf\u2028g\ud800h\u2066i\u200fj"


def test_printable_escapes_what_a_terminal_would_obey() -> None:
    assert printable(FORGED) == SHOWN


def test_printable_leaves_normal_text() -> None:
    text = r"Grüße, 日本語 مرحبا 👩‍🚀 C:\new"
    assert printable(text) == text


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a handler of somebody else's on the project's logger writes."""
    stream, logger = io.StringIO(), logging.getLogger("knn_diffusion")
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_log_lines_are_sanitised_for_every_handler(written: io.StringIO) -> None:
    logs.get("test").warning("%s failed: %s", FORGED, OSError("https://u:hunter2@host/\n12:00:00 forged"))
    assert written.getvalue() == f"{SHOWN} failed: https://u:***@host/\\n12:00:00 forged\n"


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
    said = capsys.readouterr().err
    assert r"got \x9b2J" in said
    assert r"ValueError: https://u:***@host/ \x1b[2J" in said
    assert "hunter2" not in said
    assert "\x1b" not in said
