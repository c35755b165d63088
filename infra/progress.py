"""Progress bars: redrawn on a terminal, a line at intervals in a log file."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm

LINE_EVERY_S = 30.0
"""Seconds between two lines if standard error is not a terminal."""
_NEVER_S = 1e9


class ProgressBar(tqdm):
    """A progress bar of tqdm that writes plain lines if standard error is not a terminal.

    A redrawn bar would fill a log file with carriage returns. Notebooks keep their widget.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Start the bar; the arguments are those of tqdm."""
        self._lines = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        self._next_line = time.monotonic() + LINE_EVERY_S
        if self._lines:
            options["delay"] = _NEVER_S  # tqdm itself prints nothing
        super().__init__(*arguments, **options)

    def display(self, *arguments: Any, **options: Any) -> Any:
        """Draw the bar on a terminal."""
        return None if self._lines else super().display(*arguments, **options)

    def update(self, n: float | None = 1) -> Any:
        """Advance the bar, and write a line if the last one is old enough."""
        drawn = super().update(n)
        if self._lines and not self.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            self.fp.write(f"{self._line()}\n")
            self.fp.flush()
        return drawn

    def _line(self) -> str:
        return str(self.format_meter(**{**self.format_dict, "ncols": 0}))
