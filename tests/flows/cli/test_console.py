"""Output of the commands: untrusted text, and names of options in errors."""

import logging
import os
import sys
from pathlib import Path

import pytest
import typer

from flows.cli.app import main, next_commands
from flows.cli.console import name_options, report_errors, say, table
from infra.errors import ConfigError, InputError

FORGED = "http://a/\x1b[2J\x9b2J\u202egnp.\n2     0.999  7   http://forged"
SHOWN = r"http://a/\x1b[2J\x9b2J\u202egnp.\n2     0.999  7   http://forged"


def test_table_with_control_characters_prints_one_line_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    table([{"rank": 1, "url": FORGED}, {"rank": 2, "url": "http://ä/猫.png"}], {"rank": "rank", "url": "url"})
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["rank  url", f"1     {SHOWN}", "2     http://ä/猫.png"]


def test_say_with_control_characters_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(FORGED)
    assert capsys.readouterr().out == f"{SHOWN}\n"


def test_report_errors_prints_no_control_characters_and_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), report_errors(False):
        raise InputError("https://u:hunter2@host/\x1b[2J\u202e is not a list")
    assert capsys.readouterr().err == "knn-diffusion: https://u:***@host/\\x1b[2J\\u202e is not a list\n"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("strength is out of range: 2.0", "--strength is out of range: 2.0"),
        ("guidance_scale is not finite: nan", "--guidance is not finite: nan"),
        ("num_inference_steps must be at least 1", "--steps must be at least 1"),
        ("a negative_prompt needs a guidance_scale above 1", "a --negative needs a --guidance above 1"),
        ("the neighbours is a stage", "the neighbours is a stage"),
        ("/data/target_recall/a does not exist", "/data/target_recall/a does not exist"),
    ],
)
def test_name_options_replaces_names_of_arguments(message: str, line: str) -> None:
    assert name_options(message) == line


def test_main_prints_tracebacks_without_control_characters_and_passwords(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("https://u:hunter2@host/\x1b[2J")

    monkeypatch.setattr(sys.modules["flows.cli.app"], "app", broken)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    output = capsys.readouterr().err
    assert output.startswith("Traceback")
    assert output.endswith("RuntimeError: https://u:***@host/\\x1b[2J\n")


def test_report_errors_with_quiet_silences_only_its_block(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("knn_diffusion.stage")
    with report_errors(verbose=False, quiet=True):
        logger.warning("hidden")
        assert os.environ["TQDM_DISABLE"] == "1"
    assert "TQDM_DISABLE" not in os.environ
    with report_errors(verbose=False):
        logger.warning("shown")
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["shown"]


def test_report_errors_with_value_error_of_the_code_propagates() -> None:
    with pytest.raises(ValueError, match="a bug"), report_errors(verbose=False):
        raise ValueError("a bug")
    with pytest.raises(typer.Exit), report_errors(verbose=False):
        raise ConfigError("k is out of range: 0; give at least 1")


def test_demo_ends_with_the_command_of_the_playground() -> None:
    assert next_commands(Path("build/demo/data")).endswith(" serve --root build/demo/data")
