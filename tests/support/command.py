"""Helpers that run the command in this process."""

from typer.testing import CliRunner, Result

from flows.cli.app import app


def run(*arguments: str) -> Result:
    """Run ``knn-diffusion`` with the arguments and return its exit code and output."""
    return CliRunner().invoke(app, list(arguments))


def refused(result: Result, *parts: str) -> None:
    """Check for exit code 1, no output, and one line on standard error that contains every part."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, result.stderr
    line = lines[0]
    assert line.startswith("knn-diffusion: ")
    for part in parts:
        assert part in line
