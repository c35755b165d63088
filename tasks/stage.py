"""Common code of the stages: skip committed output, run missing shards, count failed ones, log one line."""

import contextlib
import dataclasses
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from infra import artifacts, compute, logs
from infra.compute.actor_pool import FailedShard
from infra.compute.interruptible import interruptions
from infra.errors import KNNDiffusionError, StageError, TransientError
from infra.settings import Settings
from infra.verification import Listed, find_damage, listed_files, require_undamaged
from model.errors import ModelError
from tasks.references.types import Made, Reference, StageResult
from tasks.references.url_history import history_files

PROGRESS_EVERY_S = 5.0
"""Seconds between two updates of a progress artifact."""
MAX_CONSECUTIVE_TRANSIENT = 3
"""Stop after this many consecutive transient failures: the store is probably down."""

Item = TypeVar("Item")
P = ParamSpec("P")
R = TypeVar("R")


def _is_transient(task: Any, task_run: Any, state: Any) -> bool:
    try:
        state.result()
    except TransientError:
        return True
    except BaseException:
        return False
    return False


@dataclasses.dataclass(slots=True)
class StageTimings:
    """Duration of each stage of a flow in seconds, and whether it was skipped, by name.

    Durations of repeated runs of a stage are summed. The stage counts as skipped if every run was skipped.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: dict[str, bool] = dataclasses.field(default_factory=dict)

    def add(self, name: str, outcome: StageResult[Made]) -> Made:
        """Record the outcome of a stage and return its reference."""
        self.record(name, seconds=outcome.seconds, skipped=outcome.skipped)
        return outcome.reference

    def record(self, name: str, *, seconds: float, skipped: bool) -> None:
        """Record a step that has no reference, such as a registration."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.skipped[name] = self.skipped.get(name, True) and skipped

    def skip(self, name: str) -> None:
        """Record that a stage was not needed."""
        self.skipped[name] = self.skipped.get(name, True)


class ProgressPage:
    """Progress of a stage in Prefect's UI: an artifact of the task's run. Without a run, nothing happens."""

    def __init__(self, kind: str, *, total: int, done: int) -> None:
        """Create the artifact with ``done`` of ``total`` shards."""
        self._total, self._done = total, done
        self._next = time.monotonic() + PROGRESS_EVERY_S
        self._id = None
        if total > done and _in_task():
            from prefect.artifacts import create_progress_artifact

            self._id = create_progress_artifact(self._percent(), key=f"progress-{kind}", description=f"Shards: {kind}")

    def advance(self) -> None:
        """Count a shard. The artifact is updated at intervals, and after the last shard."""
        self._done += 1
        is_last = self._done == self._total
        if self._id is not None and (is_last or time.monotonic() >= self._next):
            from prefect.artifacts import update_progress_artifact

            self._next = time.monotonic() + PROGRESS_EVERY_S
            update_progress_artifact(self._id, self._percent())  # type: ignore[arg-type]  # a task is not a coroutine

    def _percent(self) -> float:
        return 100.0 * self._done / self._total


def stage_task(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a stage: a Prefect task when a flow calls it, a plain function elsewhere.

    Only ``TransientError`` is retried. Prefect's result caching is off, because committed manifests are the cache.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        step = interruptions()(function)

        @functools.cache
        def as_task() -> Callable[P, R]:
            from prefect import task
            from prefect.cache_policies import NO_CACHE

            return task(
                name=name,
                retries=3,
                retry_delay_seconds=[2, 10, 60],
                retry_condition_fn=_is_transient,
                cache_policy=NO_CACHE,
            )(step)

        @functools.wraps(step)
        def stage(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _in_flow():
                return step(*args, **kwargs)
            logs.show_progress()
            return as_task()(*args, **kwargs)

        stage.task = as_task  # type: ignore[attr-defined]  # for its options
        return stage

    return decorate


def _in_flow() -> bool:
    """Return True if called from a Prefect flow, outside of its tasks."""
    if "prefect" not in sys.modules:  # importing it takes a second, which the workers of the stages save
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None and not _in_task()


def _in_task() -> bool:
    """Return True if called from a Prefect task."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import TaskRunContext

    return TaskRunContext.get() is not None


def run_stage(
    stage: artifacts.ArtifactBuilder,
    reference: type[Made],
    make: Callable[[], artifacts.Manifest],
    *,
    note: Callable[[artifacts.Manifest], str] = lambda manifest: "",
    verify: bool = False,
    repairs: bool = False,
) -> StageResult[Made]:
    """Return the committed output of ``stage``, or run ``make`` to produce it. Logs one line in both cases.

    Args:
        stage: Builder of the artifact.
        reference: Type of the returned reference.
        make: Runs the shards that have no marker and commits the manifest.
        note: Returns the end of the log line. Default: nothing.
        verify: Check the digests of committed files. Default: False, check their presence and size only.
        repairs: Allow ``make`` to run again for a committed folder, to restore shards with damaged files. Default:
            False.

    Raises:
        IntegrityError: A committed file is damaged and cannot be restored.
    """
    started = time.monotonic()
    manifest = stage.committed_manifest()
    if manifest is not None and not _is_intact(stage, manifest, verify=verify, repairs=repairs):
        manifest = None
    skipped = manifest is not None
    manifest = manifest or make()
    seconds = time.monotonic() - started
    outcome = StageResult(
        reference=reference.of(manifest, stage.uri), skipped=skipped, seconds=seconds, note=note(manifest)
    )
    state = "skipped, already committed" if skipped else f"{seconds:.1f} s"
    logs.get("stage").info("%-11s %7d rows  %s  %s", stage.kind, manifest.rows, state, outcome.note)
    return outcome


@stage_task(name="check-files")
def check_files(*references: Reference, verify: bool = False) -> None:
    """Check the files of committed artifacts as :func:`run_stage` does. Raises ``IntegrityError`` if one is damaged."""
    for reference in references:
        require_undamaged(find_damage(_files_of(reference.uri, reference.manifest()), digests=verify))


def _is_intact(stage: artifacts.ArtifactBuilder, manifest: artifacts.Manifest, *, verify: bool, repairs: bool) -> bool:
    """Return True if no committed file is damaged; otherwise remove the markers of the damaged shards, or raise.

    The manifest is kept until ``make`` writes a new one, so a failed repair leaves the state as it was.
    """
    damage = find_damage(_files_of(stage.uri, manifest), digests=verify)
    if not damage:
        return True
    if not repairs or any(one.listed.folder != stage.uri for one in damage):
        require_undamaged(damage)
    stage.reopen({one.listed.shard for one in damage if one.listed.shard is not None})
    first = f"{damage[0].listed.uri} {damage[0].reason}"
    logs.get("stage").warning("%-11s rebuilding the shards of %d damaged files: %s", stage.kind, len(damage), first)
    return False


def _files_of(uri: str, manifest: artifacts.Manifest) -> list[Listed]:
    """Return all files that a manifest refers to: those of its shards and of its URL history."""
    histories = [Listed(folder=folder, file=file) for folder, file in history_files(manifest)]
    return [*listed_files(uri, manifest), *histories]


def run_shards(
    stage: artifacts.ArtifactBuilder,
    items: Iterable[tuple[str, Item]],
    factory: Callable[..., compute.Worker[tuple[str, Item], artifacts.Shard]],
    settings: tuple[Any, ...],
    *,
    max_lost_fraction: float = 0.0,
    **resources: Any,
) -> tuple[list[artifacts.Shard], dict[str, str]]:
    """Run the shards of ``stage`` that are not committed yet.

    Args:
        stage: Builder of the artifact.
        items: Shard names and the work item of each.
        factory: Worker class; called with ``settings`` on each actor.
        settings: Arguments of ``factory``.
        max_lost_fraction: Share of the shards that may fail, in [0, 1].
        **resources: Actors, CPUs, GPUs and concurrency, passed to ``compute.map_shards``.

    Returns:
        All committed shards in the order of ``items``, and the error message of each failed shard by name.

    Raises:
        TransientError: A shard failed with an error that a retry may resolve.
        StageError: More than ``max_lost_fraction`` of the shards failed. The others remain committed.
        KNNDiffusionError, ModelError: Every shard failed with this same error, which the user can fix.
    """
    named = dict(items)
    done = stage.committed_shards()
    pending = {name: item for name, item in named.items() if name not in done}
    lost: dict[str, str] = {}
    errors: list[BaseException] = []
    results: Any = compute.map_shards(
        factory, settings, list(pending.items()), description=stage.kind, **{"actors": compute.cpus(), **resources}
    )
    consecutive = 0
    progress = ProgressPage(stage.kind, total=len(named), done=len(done))
    with contextlib.closing(results):  # cancels the shards that are still running
        for result in results:
            progress.advance()
            if not isinstance(result, FailedShard):
                done[result.name], consecutive = result, 0
                continue
            name = result.item[0]
            errors.append(result.error)
            lost[name] = f"{type(result.error).__name__}: {result.error}"
            logs.get("stage").debug("%s: shard %s failed: %s", stage.kind, name, lost[name])
            consecutive = consecutive + 1 if isinstance(result.error, TransientError) else 0
            if consecutive == MAX_CONSECUTIVE_TRANSIENT:
                break
    if transient := [error for error in errors if isinstance(error, TransientError)]:
        raise TransientError(
            f"{stage.kind}: {len(named) - len(done)} of {len(named)} shards failed temporarily ({transient[0]}); "
            f"run again to resume, the other {len(done)} are committed"
        )
    if (
        len(lost) == len(named)
        and len(set(lost.values())) == 1
        and isinstance(errors[0], KNNDiffusionError | ModelError)
    ):
        raise errors[0]
    if len(lost) > max_lost_fraction * len(named):
        first = next(iter(lost.values()))
        raise StageError(
            f"{stage.kind}: {len(lost)} of {len(named)} shards failed ({first}); "
            f"run again to resume, the other {len(named) - len(lost)} are committed"
        )
    return [done[name] for name in named if name in done], lost


def sum_outcomes(done: Iterable[artifacts.Shard]) -> dict[str, int]:
    """Return the summed outcome counts of shards, most frequent first."""
    total: Counter[str] = Counter()
    for shard in done:
        total.update(shard.info["outcomes"])
    return dict(total.most_common())


def settings_of(root: str | None) -> Settings:
    """Return the settings of the environment, with their root replaced by ``root`` if one is given."""
    return Settings() if root is None else Settings(root=root)
