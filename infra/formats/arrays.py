"""Reader of ``.npy`` files: memory-mapped, and refused unless type and shape are the expected ones."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import IntegrityError

_EXPONENT = np.uint16(0x7C00)  # all ones in a float16 that is infinite or not a number


def read_array(path: Path, dtype: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Map the array of ``path`` into memory; ``None`` in ``shape`` stands for any length.

    Raises ``IntegrityError`` when the file is no array, or one of another type or shape.
    """
    try:
        # Mapped even where all of it is needed: a header that claims more rows than the file has allocates nothing.
        found: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(f"{path} is no array that can be read ({reason}); build it again") from error
    same_shape = found.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, found.shape, strict=True))
    if found.dtype != dtype or not same_shape:
        wanted = ", ".join("n" if length is None else str(length) for length in shape)
        raise IntegrityError(
            f"{path} holds {found.dtype} {found.shape}, not {np.dtype(dtype)} ({wanted}) as its manifest says; "
            "build it again"
        )
    return found


def require_finite(rows: NDArray[np.float16], where: str) -> None:
    """Raise ``IntegrityError`` naming the first of ``rows`` (n, D) that holds NaN or an infinity."""
    wrong = ((np.ascontiguousarray(rows).view(np.uint16) & _EXPONENT) == _EXPONENT).any(axis=1)
    if wrong.any():
        raise IntegrityError(f"{where}: row {int(wrong.argmax())} is not finite; embed its images again")
