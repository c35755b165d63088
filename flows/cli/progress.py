"""Progress bar of a generator's steps, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def step_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, and yield the callback that advances it, with the arguments (step, total steps)."""
    from infra.progress import ProgressBar

    with ProgressBar(desc=description, unit="step", leave=False) as bar:

        def on_progress(step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        yield on_progress
