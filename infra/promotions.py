"""Promotion state in MLflow: the alias ``champion``, its pin, and the records of promotion decisions.

MLflow keeps no history of aliases. A decision is therefore a run in the experiment ``promotions``, and the registered
model has two tags: ``promotion.champion`` is the version that the alias was moved to last, and ``promotion.pinned`` is
set by a rollback. An alias that differs from ``promotion.champion`` was moved by hand; it counts as pinned too. The tag
``promotion.moving`` is written before the alias moves, so that a process killed in between is not taken for a hand.
"""

import dataclasses
import functools
import json
from typing import Any

from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra import storage, tracking
from infra.registry_tags import CHAMPION
from infra.settings import Settings
from infra.tracking import is_created, mlflow_errors, registry_client

CANDIDATE = "candidate"
EXPERIMENT = "promotions"
APPROVAL_TAG = "approval"
APPROVED = "approved"
PENDING = "pending"
"""Outcome of a version whose gates pass, but which is not approved yet."""
_CHAMPION_TAG = "promotion.champion"
_MOVING_TAG = "promotion.moving"
_PIN_TAG = "promotion.pinned"
_STATE_TAG = "promotion.state"
_RUN_TAG = "promotion.run"
_NAME_TAG = "promotion.name"
_RECORD = "decision.json"
_PAGE = "decision.html"
_MISSING = "RESOURCE_DOES_NOT_EXIST"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """Result of one gate: the measured value, the limit that it is compared with, and a sentence for the record.

    ``value`` is None if the gate could not be measured.
    """

    gate: str
    passed: bool
    value: float | None
    limit: float | None
    detail: str = ""

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4f}"
        limit = "" if self.limit is None else f", limit {self.limit:.4f}"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.gate}: {'passed' if self.passed else 'failed'}, {value}{limit}{detail}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Decision about a version: ``outcome`` is promoted, refused, pinned, pending or rolled-back."""

    name: str
    version: int
    outcome: str
    before: int | None
    after: int | None
    requester: str
    gates: tuple[GateResult, ...] = ()
    force: bool = False
    reason: str = ""
    run_id: str = ""

    @property
    def moved(self) -> bool:
        """Return True if this decision made the version the champion."""
        return self.outcome in ("promoted", "rolled-back")


class Promotions:
    """Client of the promotion state in the registry that ``settings`` name."""

    def __init__(self, settings: Settings) -> None:
        """Store the settings. The first call that needs the store connects to it."""
        self._settings = settings

    @functools.cached_property
    def _client(self) -> MlflowClient:
        return registry_client(self._settings)

    def version_of(self, name: str, alias: str) -> int | None:
        """Return the version that has the alias, or None."""
        found = self._model(name)
        version = None if found is None else found.aliases.get(alias)
        return None if version is None else int(version)

    def champion(self, name: str) -> int | None:
        """Return the version that is champion, or None."""
        return self.version_of(name, CHAMPION)

    def pin(self, name: str) -> str | None:
        """Return why the champion is pinned, or None if it is not."""
        found = self._model(name)
        if found is None or CHAMPION not in found.aliases:
            return None
        champion, recorded = str(found.aliases[CHAMPION]), found.tags.get(_CHAMPION_TAG)
        if recorded is not None and champion not in (recorded, found.tags.get(_MOVING_TAG)):
            return f"the alias was moved to version {champion} by hand"
        pinned: str | None = found.tags.get(_PIN_TAG)
        return pinned

    def names(self) -> list[str]:
        """Return the names of the registered models that have a candidate."""
        if not is_created(self._settings):
            return []
        found: list[str] = []
        token = None
        with mlflow_errors(self._settings):
            while True:
                page = self._client.search_registered_models(page_token=token)
                found += [model.name for model in page if CANDIDATE in model.aliases]
                token = page.token
                if not token:
                    return found

    def undecided(self, name: str) -> int | None:
        """Return the candidate of a registered model if nobody has decided about it, or None.

        A version that waited for approval is undecided again once it is approved. With a pinned champion, only
        ``promote`` decides.
        """
        version = self.version_of(name, CANDIDATE)
        if version is None or version == self.champion(name) or self.pin(name) is not None:
            return None
        with mlflow_errors(self._settings):
            tags = self._client.get_model_version(name, str(version)).tags
        state = tags.get(_STATE_TAG)
        approved = state == PENDING and tags.get(APPROVAL_TAG) == APPROVED
        return version if state is None or approved else None

    def move(self, name: str, version: int, *, pin: str | None = None) -> None:
        """Make a version the champion, pinned for the reason ``pin`` or not pinned. Call this under the lease."""
        with mlflow_errors(self._settings):
            if pin is not None:
                self._client.set_registered_model_tag(name, _PIN_TAG, pin)
            self._client.set_registered_model_tag(name, _MOVING_TAG, str(version))
            self._client.set_registered_model_alias(name, CHAMPION, str(version))
            self._client.set_registered_model_tag(name, _CHAMPION_TAG, str(version))
            if pin is None and (found := self._model(name)) is not None and _PIN_TAG in found.tags:
                self._client.delete_registered_model_tag(name, _PIN_TAG)
            if self.version_of(name, CANDIDATE) == version:
                self._client.delete_registered_model_alias(name, CANDIDATE)

    def is_approved(self, name: str, version: int) -> bool:
        """Return True if the version has the tag ``approval=approved``."""
        with mlflow_errors(self._settings):
            tags = self._client.get_model_version(name, str(version)).tags
        return bool(tags.get(APPROVAL_TAG) == APPROVED)

    def record(self, decision: Decision, page: str) -> Decision:
        """Store a decision as a run with its HTML ``page``, and as tags of the version. Return it with the run's id."""
        with tracking.start_run(
            self._settings, experiment=EXPERIMENT, name=f"{decision.name}/{decision.version} {decision.outcome}"
        ) as run:
            decision = dataclasses.replace(decision, run_id=run.run_id)
            values = dataclasses.asdict(decision)
            with mlflow_errors(self._settings):
                for key, value in ((_NAME_TAG, decision.name), (_STATE_TAG, decision.outcome)):
                    self._client.set_tag(run.run_id, key, value)
                run.params({name: value for name, value in values.items() if name != "gates"})
                run.log(step=0, values={one.gate: one.value for one in decision.gates if one.value is not None})
                with storage.scratch() as folder:
                    (folder / _RECORD).write_text(json.dumps(values, indent=1))
                    (folder / _PAGE).write_text(page)
                    run.file(folder / _PAGE)
                    run.file(folder / _RECORD)
                self._client.set_tag(run.run_id, _RECORD, json.dumps(values))
        with mlflow_errors(self._settings):
            for key, value in ((_STATE_TAG, decision.outcome), (_RUN_TAG, decision.run_id)):
                self._client.set_model_version_tag(decision.name, str(decision.version), key, value)
        return decision

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return the recorded decisions about a registered model, newest first, each with ``at_ms``."""
        if not is_created(self._settings):
            return []
        with mlflow_errors(self._settings):
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                return []
            runs: list[Any] = []
            token = None
            while True:
                page = self._client.search_runs(
                    [found.experiment_id],
                    f"tags.`{_NAME_TAG}` = '{name}'",
                    ViewType.ACTIVE_ONLY,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
                runs.extend(page)
                token = page.token
                if not token:
                    break
        return [
            json.loads(run.data.tags[_RECORD]) | {"at_ms": run.info.start_time}
            for run in runs
            if _RECORD in run.data.tags
        ]

    def _model(self, name: str) -> Any:
        """Return the registered model, or None if there is none."""
        if not is_created(self._settings):
            return None
        with mlflow_errors(self._settings):
            try:
                return self._client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != _MISSING:
                    raise
                return None
