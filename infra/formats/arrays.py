"""Memory-mapped reader of ``.npy`` files that checks dtype and shape."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import IntegrityError

_EXPONENT = np.uint16(0x7C00)  # exponent bits of a float16: all ones for infinity and NaN


def read_array(path: Path, dtype: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Map the array in ``path`` into memory. ``None`` in ``shape`` matches any length.

    Raises ``IntegrityError`` if the file is not an array, or has another dtype or shape.
    """
    try:
        # Mapped even if all of it is needed, so that a header that claims too many rows allocates no memory.
        found: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(f"{path} is not a readable array ({reason}); rebuild it") from error
    same_shape = found.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, found.shape, strict=True))
    if found.dtype != dtype or not same_shape:
        expected = ", ".join("n" if length is None else str(length) for length in shape)
        raise IntegrityError(
            f"{path} holds {found.dtype} {found.shape}, not {np.dtype(dtype)} ({expected}) as in its manifest; "
            "rebuild it"
        )
    return found


def require_finite(rows: NDArray[np.float16], where: str) -> None:
    """Raise ``IntegrityError`` with the number of the first of ``rows`` (n, D) that contains NaN or infinity."""
    invalid = ((np.ascontiguousarray(rows).view(np.uint16) & _EXPONENT) == _EXPONENT).any(axis=1)
    if invalid.any():
        raise IntegrityError(f"{where}: row {int(invalid.argmax())} is not finite; embed its images again")
