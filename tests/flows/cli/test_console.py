"""What commands print of text that came from the web."""

import sys

import pytest
import typer

from flows.cli.app import main
from flows.cli.console import report_errors, say, table
from infra.errors import InputError

FORGED = "http://a/\x1b[2J\x9b2J\u202egnp.\n2     0.999  7   http://forged"
SHOWN = r"http://a/\x1b[2J\x9b2J\u202egnp.\n2     0.999  7   http://forged"


def test_table_keeps_a_row_on_its_line_whatever_a_url_holds(capsys: pytest.CaptureFixture[str]) -> None:
    table([{"rank": 1, "url": FORGED}, {"rank": 2, "url": "http://ä/猫.png"}], {"rank": "rank", "url": "url"})
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["rank  url", f"1     {SHOWN}", "2     http://ä/猫.png"]


def test_say_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(FORGED)
    assert capsys.readouterr().out == f"{SHOWN}\n"


def test_told_prints_an_error_without_control_characters_and_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), report_errors(False):
        raise InputError("https://u:hunter2@host/\x1b[2J\u202e is no list")
    assert capsys.readouterr().err == "knn-diffusion: https://u:***@host/\\x1b[2J\\u202e is no list\n"


def test_main_prints_tracebacks_without_control_characters_and_passwords(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("https://u:hunter2@host/\x1b[2J")

    monkeypatch.setattr(sys.modules["flows.cli.app"], "app", broken)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("RuntimeError: https://u:***@host/\\x1b[2J\n")
