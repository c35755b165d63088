"""Fixtures of the recipe of the bundled generator."""

import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.scripts import load_script
from support.sticker_recipe import SCRIPT, Done, Run, write_style
from support.tiny_domain import COLOURS


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    """Return a function that runs a command in this process, and returns its exit message, or its log if it ends well.

    The command replaces the handler of SIGTERM, which the fixture restores. Until then the signal has no effect.
    """
    caplog.set_level(logging.INFO)
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def command(*words: str) -> Done:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", list(words[1:]))
        try:
            script.main()
        except SystemExit as end:
            return Done(1, str(end.code))
        return Done(0, caplog.text)

    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def stickers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stickers")
    for name, colours in (("one", COLOURS[:2]), ("two", COLOURS[2:4]), ("openmoji", COLOURS[4:6])):
        write_style(folder / f"{name}.parquet", colours)
    return folder
