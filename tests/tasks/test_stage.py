"""Tests of the common stage code: skipping, failed shards, retries and repairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fakes import WithoutRay
from support.object_stores import Bucket

from infra import artifacts, compute, storage
from infra.errors import InputError, IntegrityError, StageError, TransientError
from tasks.references.types import ImageShards
from tasks.stage import check_files, run_shards, run_stage, stage_task


def counting() -> Any:
    """Return a worker that commits a shard with as many rows as its item says, and fails for an item of 0.

    Defined inside a function so that Ray pickles it by value: its workers cannot import the tests.
    """

    class Counting:
        def __init__(self, uri: str, folder: str) -> None:
            self.uri, self.folder = uri, Path(folder)

        def __call__(self, item: tuple[str, int]) -> artifacts.Shard:
            name, rows = item
            if rows == 0:
                raise InputError(f"{name} cannot be read")
            local = self.folder / name
            local.mkdir()
            (local / f"{name}.txt").write_text("x" * rows)
            return artifacts.commit_shard(self.uri, name, local, rows=rows, info={})

    return Counting


def stage_at(folder: Path) -> artifacts.ArtifactBuilder:
    return artifacts.ArtifactBuilder(str(folder / "base"), "images", inputs={}, config={"a": 1})


def unreachable() -> Any:
    """Return a worker whose store is unreachable, except for items above 0."""

    class Unreachable:
        def __init__(self, uri: str, folder: str) -> None:
            self.uri, self.folder = uri, Path(folder)

        def __call__(self, item: tuple[str, int]) -> artifacts.Shard:
            name, rows = item
            (self.folder / f"tried-{name}").touch()
            if rows == 0:
                raise TransientError("the store could not be reached")
            (self.folder / name).mkdir()
            return artifacts.commit_shard(self.uri, name, self.folder / name, rows=rows, info={})

    return Unreachable


def test_run_shards_with_unreachable_store_stops_early_with_transient_error(alone: WithoutRay, tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    items = [(f"{number:05d}", int(number == 0)) for number in range(30)]
    with pytest.raises(TransientError) as caught:
        run_shards(stage, items, unreachable(), (stage.uri, str(tmp_path)), actors=1, max_lost_fraction=1.0)
    assert str(caught.value) == (
        "images: 29 of 30 shards failed temporarily (the store could not be reached); run again to resume, "
        "the other 1 are committed"
    )
    assert list(stage.committed_shards()) == ["00000"]
    assert len(list(tmp_path.glob("tried-*"))) < 10


def test_run_stage_with_committed_output_skips(tmp_path: Path) -> None:
    stage, made = stage_at(tmp_path), []

    def make() -> artifacts.Manifest:
        made.append(1)
        return stage.commit([], info={})

    first, second = (run_stage(stage, ImageShards, make) for _ in range(2))
    assert (first.skipped, second.skipped, len(made)) == (False, True, 1)
    assert first.reference == second.reference


def test_run_shards_on_ray_retries_only_failed_shards_and_clamps_workers_to_the_cores(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    settings = (stage.uri, str(tmp_path))
    items = [("00000", 3), ("00001", 0), ("00002", 2)]
    with compute.cluster(cores=1):
        with pytest.raises(StageError, match=r"1 of 3 shards failed \(InputError: 00001 cannot be read\).*other 2 are"):
            run_shards(stage, items, counting(), settings, actors=1)
        assert sorted(stage.committed_shards()) == ["00000", "00002"]
        done, lost = run_shards(stage, items, counting(), settings, actors=1, max_lost_fraction=0.4)
        assert [shard.rows for shard in done] == [3, 2]  # running these again would fail: their folders exist
        assert lost == {"00001": "InputError: 00001 cannot be read"}
        with pytest.raises(InputError, match="alone cannot be read"):
            run_shards(stage, [("alone", 0)], counting(), settings, actors=1)

        more = [(f"1000{number}", number + 1) for number in range(6)]
        done, lost = run_shards(stage, more, counting(), settings, actors=3, cpus_per_actor=2)
        assert ([shard.rows for shard in done], lost) == ([1, 2, 3, 4, 5, 6], {})
        assert compute.run(abs, -3, cpus=4) == 3
        with pytest.raises(StageError, match="1 GPUs per worker requested, but the largest machine has 0"):
            run_shards(stage, [("x", 1)], counting(), settings, gpus_per_actor=1)
        with pytest.raises(StageError, match="1 GPUs per worker requested, but the largest machine has 0; request no"):
            compute.run(abs, -1, gpus=1)


def test_compute_run_without_cluster_raises_stage_error() -> None:
    with pytest.raises(StageError, match="run stages inside compute"):
        compute.run(abs, -1)


@pytest.mark.parametrize("address", ["10.0.0.5", "10.0.0.5:ray"])
def test_compute_start_with_address_without_port_raises_one_line_error(address: str) -> None:
    with compute.cluster(address), pytest.raises(InputError) as caught:
        compute.start()
    assert str(caught.value).startswith(f"not an address of a Ray cluster: {address} (")
    assert str(caught.value).endswith("); use HOST:PORT, ray://HOST:PORT or auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("error", "tries"), [(TransientError, 3), (InputError, 1), (ZeroDivisionError, 1)])
def test_stage_task_retries_only_transient_errors(prefect_server: None, error: type[Exception], tries: int) -> None:
    tried: list[int] = []

    @stage_task("fails twice")
    def fails() -> str:
        tried.append(1)
        if len(tried) < 3:
            raise error("no")
        return "made"

    impatient: Any = fails.task().with_options(retry_delay_seconds=0)  # type: ignore[attr-defined]
    if tries == 1:
        with pytest.raises(error):
            impatient()
    else:
        assert impatient() == "made"
    assert len(tried) == tries


def make_in(
    stage: artifacts.ArtifactBuilder, texts: dict[str, str], made: list[str]
) -> Callable[[], artifacts.Manifest]:
    """Return a function that commits the shards of ``texts`` without a marker and appends their names to ``made``."""

    def make() -> artifacts.Manifest:
        done = stage.committed_shards()
        for name, text in texts.items():
            if name in done:
                continue
            with storage.scratch() as folder:
                (folder / f"{name}.txt").write_text(text)
                done[name] = artifacts.commit_shard(stage.uri, name, folder, rows=1, info={})
            made.append(name)
        return stage.commit(done.values(), info={})

    return make


TEXTS = {"00000": "zero", "00001": "one", "00002": "two"}
DAMAGE = {
    "missing": (None, "is missing though it was committed"),
    "cut": (b"o", "has 1 bytes, 3 were committed"),
    "longer": (b"one more", "has 8 bytes, 3 were committed"),
    "other bytes": (b"two", "differs from its committed digest "),
}


@pytest.fixture(params=["local", "moto"])
def stored_stage(request: pytest.FixtureRequest, tmp_path: Path) -> artifacts.ArtifactBuilder:
    """A stage on a local disk and in an object store."""
    base = str(tmp_path)
    if request.param == "moto":
        bucket: Bucket = request.getfixturevalue("moto_bucket")
        base = f"{bucket.uri}/base"
    return artifacts.ArtifactBuilder(base, "images", inputs={}, config={"a": 1})


def damage(stage: artifacts.ArtifactBuilder, data: bytes | None) -> str:
    uri = storage.join(stage.uri, "00001.txt")
    if data is None:
        storage.remove(uri)
    else:
        storage.write_bytes(uri, data)
    return uri


@pytest.mark.parametrize("kind", DAMAGE)
def test_run_stage_with_damaged_file_raises_one_line_error(kind: str, stored_stage: artifacts.ArtifactBuilder) -> None:
    make = make_in(stored_stage, TEXTS, [])
    run_stage(stored_stage, ImageShards, make)
    data, reason = DAMAGE[kind]
    uri = damage(stored_stage, data)
    if kind == "other bytes":
        assert run_stage(stored_stage, ImageShards, make).skipped  # the size is the same: only the digest differs
    with pytest.raises(IntegrityError) as caught:
        run_stage(stored_stage, ImageShards, make, verify=kind == "other bytes")
    message = str(caught.value)
    assert message.startswith(f"{uri} {reason}")
    assert message.endswith(f"; restore it, or delete {stored_stage.uri} and run again")
    assert "\n" not in message
    assert storage.exists(storage.join(stored_stage.uri, artifacts.MANIFEST))


@pytest.mark.parametrize("kind", DAMAGE)
def test_run_stage_with_repairs_rebuilds_only_the_damaged_shard(
    kind: str, stored_stage: artifacts.ArtifactBuilder
) -> None:
    made: list[str] = []
    make = make_in(stored_stage, TEXTS, made)
    first = run_stage(stored_stage, ImageShards, make)
    made.clear()
    uri = damage(stored_stage, DAMAGE[kind][0])
    again = run_stage(stored_stage, ImageShards, make, verify=True, repairs=True)
    assert (again.skipped, made) == (False, ["00001"])
    assert again.reference == first.reference  # the same content and therefore the same digest
    assert storage.read_bytes(uri) == b"one"
    assert run_stage(stored_stage, ImageShards, make, verify=True, repairs=True).skipped


def test_run_stage_after_failed_repair_keeps_the_manifest(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    first = run_stage(stage, ImageShards, make_in(stage, TEXTS, []))
    uri = damage(stage, None)

    def fail() -> artifacts.Manifest:
        raise InputError("its inputs are gone")

    with pytest.raises(InputError, match="its inputs are gone"):
        run_stage(stage, ImageShards, fail, repairs=True)
    assert ImageShards.open(stage.uri) == first.reference
    run_stage(stage, ImageShards, make_in(stage, TEXTS, []), repairs=True)
    assert storage.read_bytes(uri) == b"one"


def test_run_stage_with_damage_in_earlier_version_does_not_repair_it(tmp_path: Path) -> None:
    before, after = (artifacts.ArtifactBuilder(str(tmp_path), "images", inputs={}, config={"a": n}) for n in range(2))
    manifest = make_in(before, TEXTS, [])()

    def make() -> artifacts.Manifest:
        return after.commit([shard.reused_from(before.uri) for shard in manifest.shards], info={})

    run_stage(after, ImageShards, make)
    uri = damage(before, None)
    with pytest.raises(IntegrityError, match="is missing though it was committed") as caught:
        run_stage(after, ImageShards, make, repairs=True)
    assert str(caught.value).startswith(uri)
    assert len(before.committed_shards()) == 3
    with pytest.raises(IntegrityError, match="is missing though it was committed"):
        check_files(ImageShards.open(after.uri))
