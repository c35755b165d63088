"""Tests of the reader of untrusted array files."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import IntegrityError
from infra.formats.arrays import read_array, require_finite


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ROWS = np.ones((3, 4), np.float16)
OVERSTATED = npy(ROWS).replace(b"'shape': (3, 4), }        ", b"'shape': (30000000, 4), }")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"text",
        npy(ROWS)[:-1],
        npy(ROWS.astype(np.float32)),
        npy(ROWS[:2]),
        npy(ROWS[:, 0]),
        npy(np.array([{"a": 1}], dtype=object)),
        npy(ROWS).replace(b"(3, 4)", b"(3, -)"),
        npy(ROWS).replace(b"'<f2'", b"'|O8'"),
        OVERSTATED,
    ],
)
def test_read_array_of_another_type_shape_or_size_raises_integrity_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.npy").write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        read_array(tmp_path / "rows.npy", np.float16, (3, None))
    assert str(caught.value).startswith(f"{tmp_path}/rows.npy ")
    assert "\n" not in str(caught.value)


def test_read_array_of_the_expected_type_returns_its_values(tmp_path: Path) -> None:
    (tmp_path / "rows.npy").write_bytes(npy(ROWS))
    assert np.array_equal(read_array(tmp_path / "rows.npy", np.float16, (3, None)), ROWS)
    (tmp_path / "none.npy").write_bytes(npy(np.zeros(0, np.int64)))
    assert len(read_array(tmp_path / "none.npy", np.int64, (None,))) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_require_finite_with_nan_or_infinity_names_the_row(value: float) -> None:
    rows = np.full((5, 4), 65504, np.float16)
    require_finite(rows, "shard 00001")
    rows[3, 2] = value
    with pytest.raises(IntegrityError, match=r"^shard 00001: row 3 is not finite; embed its images again$"):
        require_finite(rows, "shard 00001")
