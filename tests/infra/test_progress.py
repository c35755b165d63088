"""Progress bars without a terminal."""

import io
import sys

import pytest

from infra import progress


def test_progress_bar_without_terminal_writes_lines_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("infra.progress.time.monotonic", lambda: now[0])
    with progress.ProgressBar(total=4, desc="embed", unit="shard", leave=False) as bar:
        bar.set_postfix_str("3 images/s")
        for _ in range(4):
            now[0] += 0.6 * progress.LINE_EVERY_S
            bar.update()
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert lines[0].startswith("embed:")
    assert "2/4" in lines[0] and "4/4" in lines[1] and lines[2] == ""
    assert "\r" not in stream.getvalue()


def test_progress_bar_on_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.ProgressBar(total=2, desc="embed", mininterval=0, file=stream) as bar:
        bar.update(2)
    assert "\r" in stream.getvalue()
