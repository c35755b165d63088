"""Commands that maintain databases: every option has its effect."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from support.changing_domain import BODY, FIRST, NAMES, Living
from support.fakes import Reply, WithoutRay
from typer.testing import CliRunner, Result

from flows.cli.app import app
from infra import artifacts
from infra.storage import lease

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> str:
    """Run a command that must succeed, and return its standard output."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_rebuild_index_options_retry_take_down_and_compact(living: Living, ray: WithoutRay) -> None:
    from flows.rebuild_steps import champion_of

    def tars() -> bytes:
        """Return the concatenated tar files of the champion."""
        images = champion_of("shapes", living.settings).images
        shards, cache = images.manifest().shards, living.folder / "cache"
        return b"".join(artifacts.fetch_shard(images.uri, shard, ".tar", cache).read_bytes() for shard in shards)

    rebuild = ("rebuild-index", "shapes", "--root", str(living.root))
    late, gone = NAMES[FIRST], NAMES[1]
    living.server.replies[late] = (Reply(status=503), Reply(body=BODY[late]))
    living.build(NAMES[: FIRST + 1])
    urls = ("--urls", living.listed(*NAMES[: FIRST + 1]))
    living.server.requests.clear()
    assert done(*rebuild, *urls) == "models:/knn-database.shapes@champion is unchanged"
    assert living.server.requests == []
    assert done(*rebuild, *urls, "--retry-failed") == "models:/knn-database.shapes@champion"
    assert living.server.requests == [late]
    assert living.champion() == set(NAMES[: FIRST + 1])

    done(*rebuild, "--takedown", living.listed({"url": living.server.url(gone)}, name="down.jsonl"))
    assert living.champion() == set(NAMES[: FIRST + 1]) - {gone}
    assert BODY[gone] in tars(), "too few rows are hidden for automatic compaction"
    done(*rebuild, "--compact")
    assert living.champion() == set(NAMES[: FIRST + 1]) - {gone}
    assert BODY[gone] not in tars()
    assert BODY[late] in tars()


def test_merge_and_subset_build_databases_from_others(living: Living, ray: WithoutRay) -> None:
    root = ("--root", str(living.root))
    circles = {name for name in NAMES[:10] if "circle" in name}
    assert 0 < len(circles) < 10
    living.start({"shapes": NAMES[:6], "others": NAMES[6:10]})
    assert done("merge", "both", "shapes", "others", *root) == "models:/knn-database.both@champion"
    assert living.champion("both") == set(NAMES[:10])
    part = ("subset", "circles", "both", "--where", 'url like "%circle%"', *root)
    assert done(*part) == "models:/knn-database.circles@champion"
    assert living.champion("circles") == circles
    for command, expected in (
        (("subset", "shapes", "both", "--where", 'url like "%circle%"', *root), circles),
        (("merge", "others", "both", "circles", *root), set(NAMES[:10])),
    ):
        refused = run(*command)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "pass --replace" in refused.stderr
        done(*command, "--replace")
        assert living.champion(command[1]) == expected


def test_index_options_change_the_index_of_existing_databases(living: Living, ray: WithoutRay) -> None:
    from flows.rebuild_steps import champion_of

    def index_settings(domain: str) -> tuple[Any, ...]:
        manifest = champion_of(domain, living.settings).database.manifest()
        names = ("index", "memory_bytes", "target_recall", "dedup", "recall_queries")
        return (manifest.info["factory"], *(manifest.config[name] for name in names))

    root = ("--root", str(living.root))
    options = ("--index", "IVF2,SQfp16", "--memory", "0.5", "--target-recall", "0.9", "--dedup")
    expected = ("IVF2,SQfp16", "IVF2,SQfp16", 1 << 29, 0.9, True, 4)
    living.start({"shapes": NAMES[:6], "others": NAMES[6:10]})
    for command in (
        ("merge", "both", "shapes", "others"),
        ("subset", "some", "shapes", "--where", "width > 0"),
        ("rebuild-index", "shapes"),
    ):
        done(*command, *options, *root)
        assert index_settings(command[1]) == expected
    grown = ("rebuild-index", "shapes", "--urls", living.listed(*NAMES[:7]))
    done(*grown, "--index", "auto", "--no-dedup", *root)
    assert index_settings("shapes") == ("Flat", "auto", 1 << 29, 0.9, False, 4)
    refused = run("rebuild-index", "shapes", "--target-recall", "2", *root)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "--target-recall is " in refused.stderr


def test_writing_commands_with_wait_wait_for_another_writer(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, other_writer, conflicts = lease._acquire, contextlib.ExitStack(), list[str]()

    def release_on_conflict(folder: str, *arguments: Any) -> Any:
        held = acquire(folder, *arguments)
        if held is None:
            conflicts.append(folder)
            other_writer.close()
        return held

    living.create_registry()
    root = ("--root", str(living.root))
    listed = ("--urls", living.listed(*NAMES[:3]))
    for command in (
        ("new-domain", "shapes", *listed, "--allow-host", living.server.host),
        ("rebuild-index", "shapes", *listed),
        ("subset", "some", "shapes", "--where", "width > 0"),
        ("merge", "both", "shapes", "some"),
    ):
        other_writer.enter_context(lease.lease(f"{living.root}/{command[1]}", holder="test"))
        with monkeypatch.context() as patch:
            patch.setattr(lease, "_acquire", release_on_conflict)
            patch.setattr(lease, "_POLL_S", 0.01)
            done(*command, "--wait", "30", *root)
    assert conflicts == [f"{living.root}/{domain}" for domain in ("shapes", "shapes", "some", "both")]


def test_rebuild_index_with_damaged_champion_fails(living: Living, ray: WithoutRay) -> None:
    from flows.rebuild_steps import champion_of

    living.start(NAMES[:8])
    rows = champion_of("shapes", living.settings).embeddings
    path = Path(rows.uri) / rows.manifest().shards[0].file(".npy").name
    whole = path.read_bytes()
    rebuild = ("rebuild-index", "shapes", "--root", str(living.root))

    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert done(*rebuild) == "models:/knn-database.shapes@champion is unchanged"
    refused = run(*rebuild, "--verify")
    assert refused.exit_code == 1
    assert f"{path} differs from its committed digest" in refused.stderr
    path.unlink()
    refused = run(*rebuild, "--urls", living.listed(*NAMES[:9]))
    assert refused.exit_code == 1
    assert f"{path} is missing though it was committed; restore it, or delete" in refused.stderr

    again = living.build(NAMES[:8])  # new-domain still has the images of the shard, and writes it again
    assert again.skipped == {"download": True, "embed": False, "index": True, "register_database": True}
    assert path.read_bytes() == whole
    assert living.champion() == set(NAMES[:8])
