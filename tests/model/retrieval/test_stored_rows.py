"""Memory-mapping of embedding files, and its limit per process."""

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
from model.retrieval.concatenated_rows import ConcatenatedRows
from model.retrieval.database import Database
from model.retrieval.ranked_search import SearchEffort
from model.retrieval.recall import exact_neighbours
from model.retrieval.stored_rows import StoredRows

MOST = 3
ROWS = np.split(tiny_models.unit_rows(60), 12)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "MAX_MAPPED", MOST)


def parts_of(folder: Path, rows: Sequence[NDArray[np.float16]] = ROWS) -> list[StoredRows]:
    """Write a file for each of ``rows``; each file is located on first use."""
    for number, part in enumerate(rows):
        np.save(folder / f"{number}.npy", part)

    def locate(number: int) -> Path:
        return folder / f"{number}.npy"

    located: list[Callable[[], Path]] = [partial(locate, number) for number in range(len(rows))]
    return [StoredRows(one, tiny_models.WIDTH, len(part)) for one, part in zip(located, rows, strict=True)]


def mapped(folder: Path) -> set[str]:
    """Return the names of the files in ``folder`` that this process has open; mapped files are open."""
    names = set()
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and str(folder) in str(target := link.readlink()):
            names.add(target.name)
    return names


def test_stored_rows_over_limit_unmaps_oldest_file(tmp_path: Path) -> None:
    database = tiny_models.database(tmp_path, *ROWS)
    ids = np.random.default_rng(0).integers(0, 60, 200)
    np.testing.assert_array_equal(database.rows(ids), np.concatenate(ROWS)[ids])
    assert mapped(tmp_path) == {"9.npy", "10.npy", "11.npy"}
    for part, rows in zip(database.parts, ROWS, strict=True):
        np.testing.assert_array_equal(part[:], rows)
        assert len(mapped(tmp_path)) <= MOST


def test_concatenated_rows_read_as_one_array_within_limit(tmp_path: Path) -> None:
    whole, joined = np.concatenate(ROWS), ConcatenatedRows(parts_of(tmp_path))
    assert (len(joined), joined.nbytes) == (60, whole.nbytes)
    assert mapped(tmp_path) == set()
    ids = np.random.default_rng(0).integers(0, 60, (7, 3))
    np.testing.assert_array_equal(joined[ids], whole[ids])
    assert len(mapped(tmp_path)) == MOST
    np.testing.assert_array_equal(joined[5:50], whole[5:50])


def test_stored_rows_limit_is_shared_and_deleted_database_unmaps(tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        database = tiny_models.database(folder, *ROWS)
        database.rows(np.arange(60))
        assert len(mapped(tmp_path)) == len(mapped(folder)) == MOST
    del database
    assert mapped(tmp_path) == set()


def test_stored_rows_concurrent_reads_over_limit_are_correct(tmp_path: Path) -> None:
    database, rows = tiny_models.database(tmp_path, *ROWS), np.concatenate(ROWS)
    requests = [np.random.default_rng(seed).integers(0, 60, 30) for seed in range(300)]
    with ThreadPoolExecutor(8) as pool:
        for ids, found in zip(requests, pool.map(database.rows, requests), strict=True):
            np.testing.assert_array_equal(found, rows[ids])
    assert len(mapped(tmp_path)) <= MOST


def test_exact_neighbours_leaves_files_unmapped(tmp_path: Path) -> None:
    parts, queries = parts_of(tmp_path), tiny_models.unit_rows(4, seed=1).astype(np.float32)
    parts[5].array  # noqa: B018 - maps the file
    expected = exact_neighbours(ROWS, queries)
    np.testing.assert_array_equal(exact_neighbours(parts, queries).ids, expected.ids)
    assert mapped(tmp_path) == {"5.npy"}
    (tmp_path / "0.npy").unlink()
    exact_neighbours(parts, queries, grown_from=(expected, 5))
    assert mapped(tmp_path) == {"5.npy"}


def test_to_device_copies_rows_without_mapping_files(tmp_path: Path) -> None:
    files = [
        dataclasses.replace(shard, rows=(len(rows),))
        for shard, rows in zip(tiny_models.shard_files(tmp_path, *ROWS), ROWS, strict=True)
    ]
    database = Database(files, encoder=tiny_models.identity(), quantizer=tmp_path / "quantizer.faiss")
    moved, queries = database.to("cpu"), tiny_models.unit_rows(4, seed=1)
    assert mapped(tmp_path) == set()
    np.testing.assert_array_equal(moved.search(queries, 5).ids, database.search(queries, 5).ids)


def test_stored_rows_as_array_supports_dtype_and_copy(tmp_path: Path) -> None:
    (part, *_) = parts_of(tmp_path)
    copied = np.array(part)
    copied[0] = 0
    np.testing.assert_array_equal(np.asarray(part, np.float32), ROWS[0].astype(np.float32))
    np.testing.assert_array_equal(part[:], ROWS[0])
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(part)[0] = 0


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat", "IVF2,PQ4x4"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_search_row_not_finite_raises_with_file(value: float, factory: str, tmp_path: Path) -> None:
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
        f"row 35 of database database is not finite: {tmp_path}/1.npy; embed the images of its shard again"
    )


@pytest.mark.parametrize("data", [b"", b"text", "cut", "float32", "flat"])
def test_stored_rows_unreadable_or_wrong_file_raises(data: bytes | str, tmp_path: Path) -> None:
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
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("; rebuild the database")
    assert "\n" not in str(caught.value)
