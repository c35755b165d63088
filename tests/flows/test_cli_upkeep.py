"""The commands that keep databases, as a user gives them: that each option arrives, by what comes of it."""

from typing import Any

from fakes import WithoutRay
from living import NAMES, Living
from typer.testing import CliRunner, Result

from flows.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> str:
    """What a command that succeeds prints on standard output."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_what_the_index_is_to_be_can_be_said_of_a_database_that_there_is(living: Living, ray: WithoutRay) -> None:
    from flows.rebuild_index import champion_of

    def made(domain: str) -> tuple[Any, ...]:
        manifest = champion_of(domain, living.settings).database.manifest()
        names = ("index", "memory_bytes", "target_recall", "dedup", "recall_queries")
        return (manifest.info["factory"], *(manifest.config[name] for name in names))

    root = ("--root", str(living.root))
    asked = ("--index", "IVF2,SQfp16", "--memory", "0.5", "--target-recall", "0.9", "--dedup")
    told = ("IVF2,SQfp16", "IVF2,SQfp16", 1 << 29, 0.9, True, 4)
    living.build(NAMES[:6])
    living.build(NAMES[6:8], domain="others")
    for command in (
        ("merge", "both", "shapes", "others"),
        ("subset", "some", "shapes", "--where", "width > 0"),
        ("rebuild-index", "shapes"),
    ):
        done(*command, *asked, *root)
        assert made(command[1]) == told
    grown = ("rebuild-index", "shapes", "--urls", living.listed(*NAMES[:7]))
    done(*grown, "--index", "auto", "--no-dedup", *root)
    assert made("shapes") == ("Flat", "auto", 1 << 29, 0.9, False, 4)
    refused = run("rebuild-index", "shapes", "--target-recall", "2", *root)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "target_recall is a share" in refused.stderr
