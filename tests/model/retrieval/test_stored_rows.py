"""Files that a process keeps mapped are few, however many a database has."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import tiny_models

from model.errors import ModelError
from model.retrieval import stored_rows
from model.retrieval.database import Database, SearchEffort
from model.retrieval.recall import exact_neighbours
from model.retrieval.stored_rows import StoredRows
from model.training.neighbour_rows import ConcatenatedRows

MOST = 3
ROWS = np.split(tiny_models.unit_rows(60), 12)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "MOST_MAPPED", MOST)


def parts_of(folder: Path, rows: Sequence[NDArray[np.float16]] = ROWS) -> list[StoredRows]:
    """A file for each of ``rows``, found when it is first asked for."""
    for number, part in enumerate(rows):
        np.save(folder / f"{number}.npy", part)

    def found(number: int) -> Path:
        return folder / f"{number}.npy"

    located: list[Callable[[], Path]] = [partial(found, number) for number in range(len(rows))]
    return [StoredRows(one, tiny_models.WIDTH, len(part)) for one, part in zip(located, rows, strict=True)]


def mapped(folder: Path) -> set[str]:
    """The files of ``folder`` that this process holds open, as a mapping does."""
    held = set()
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and str(folder) in str(target := link.readlink()):
            held.add(target.name)
    return held


def test_of_many_files_those_mapped_last_stay_mapped(tmp_path: Path) -> None:
    database = tiny_models.database(tmp_path, *ROWS)
    ids = np.random.default_rng(0).integers(0, 60, 200)
    np.testing.assert_array_equal(database.rows(ids), np.concatenate(ROWS)[ids])
    assert mapped(tmp_path) == {"9.npy", "10.npy", "11.npy"}
    for part, rows in zip(database.parts, ROWS, strict=True):
        np.testing.assert_array_equal(part[:], rows)
        assert len(mapped(tmp_path)) <= MOST


def test_training_reads_them_as_one_array_and_maps_few(tmp_path: Path) -> None:
    whole, joined = np.concatenate(ROWS), ConcatenatedRows(parts_of(tmp_path))
    assert (len(joined), joined.nbytes) == (60, whole.nbytes)
    assert mapped(tmp_path) == set()
    ids = np.random.default_rng(0).integers(0, 60, (7, 3))
    np.testing.assert_array_equal(joined[ids], whole[ids])
    assert len(mapped(tmp_path)) == MOST
    np.testing.assert_array_equal(joined[5:50], whole[5:50])


def test_databases_share_the_bound_and_one_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        database = tiny_models.database(folder, *ROWS)
        database.rows(np.arange(60))
        assert len(mapped(tmp_path)) == len(mapped(folder)) == MOST
    del database
    assert mapped(tmp_path) == set()


def test_threads_that_let_each_others_files_go_read_the_same_rows(tmp_path: Path) -> None:
    database, rows = tiny_models.database(tmp_path, *ROWS), np.concatenate(ROWS)
    asked = [np.random.default_rng(seed).integers(0, 60, 30) for seed in range(300)]
    with ThreadPoolExecutor(8) as pool:
        for ids, found in zip(asked, pool.map(database.rows, asked), strict=True):
            np.testing.assert_array_equal(found, rows[ids])
    assert len(mapped(tmp_path)) <= MOST


def test_a_truth_keeps_no_file_mapped_that_was_not(tmp_path: Path) -> None:
    parts, queries = parts_of(tmp_path), tiny_models.unit_rows(4, seed=1).astype(np.float32)
    parts[5].array  # noqa: B018 - mapped, and stays so
    expected = exact_neighbours(ROWS, queries)
    np.testing.assert_array_equal(exact_neighbours(parts, queries).ids, expected.ids)
    assert mapped(tmp_path) == {"5.npy"}
    (tmp_path / "0.npy").unlink()
    exact_neighbours(parts, queries, grown_from=(expected, 5))
    assert mapped(tmp_path) == {"5.npy"}


def test_all_rows_go_to_an_accelerator_and_no_file_stays_mapped(tmp_path: Path) -> None:
    files = [
        dataclasses.replace(shard, rows=(len(rows),))
        for shard, rows in zip(tiny_models.shard_files(tmp_path, *ROWS), ROWS, strict=True)
    ]
    database = Database(files, encoder=tiny_models.identity(), quantizer=tmp_path / "quantizer.faiss")
    moved, queries = database.to("cpu"), tiny_models.unit_rows(4, seed=1)
    assert mapped(tmp_path) == set()
    np.testing.assert_array_equal(moved.search(queries, 5).ids, database.search(queries, 5).ids)


def test_an_array_of_rows_may_be_of_another_type_or_a_copy(tmp_path: Path) -> None:
    (part, *_) = parts_of(tmp_path)
    copied = np.array(part)
    copied[0] = 0
    np.testing.assert_array_equal(np.asarray(part, np.float32), ROWS[0].astype(np.float32))
    np.testing.assert_array_equal(part[:], ROWS[0])
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(part)[0] = 0


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat", "IVF2,PQ4x4"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_search_that_meets_a_row_that_is_not_finite_names_its_file(value: float, factory: str, tmp_path: Path) -> None:
    parts = np.split(tiny_models.unit_rows(60), 2)
    files = tiny_models.shard_files(tmp_path, *parts, factory=factory)
    damaged = parts[1].copy()
    damaged[5, 3] = value
    np.save(tmp_path / "1.npy", damaged)
    effort = SearchEffort(nprobe=2)
    database = Database(files, encoder=tiny_models.identity(), quantizer=tmp_path / "quantizer.faiss", effort=effort)
    queries = parts[1][5:6].astype(np.float32)
    with pytest.raises(ModelError) as caught:
        database.search(queries / np.linalg.norm(queries), 60)
    assert str(caught.value) == (
        f"row 35 of database database is not finite, in {tmp_path}/1.npy; embed the images of its shard again"
    )


@pytest.mark.parametrize("data", [b"", b"text", "cut", "float32", "flat"])
def test_rows_of_another_type_are_refused_in_one_line(data: bytes | str, tmp_path: Path) -> None:
    path, rows = tmp_path / "1.npy", ROWS[0]
    np.save(path, rows)
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        np.save(path, rows.astype(np.float32) if data == "float32" else rows[:, 0])
    with pytest.raises(ModelError) as caught:
        StoredRows(path, tiny_models.WIDTH, len(rows))[0]
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).endswith("; rebuild the database")
    assert "\n" not in str(caught.value)
