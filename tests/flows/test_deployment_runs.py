"""Tests of starting, following, listing and cancelling runs, with a fake client of Prefect's server."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, Self
from uuid import UUID

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running
from support.fakes import FakeClock

from flows import deployment_runs
from flows.deployment_runs import OUTAGE_S, cancel, follow, link, list_runs, merge_parameters, start_run
from infra.errors import InputError, NotFoundError, StageError

RUN = UUID("01234567-89ab-cdef-0123-456789abcdef")


class Client:
    """Fake client whose run passes through ``states``; for None, the server does not answer."""

    def __init__(self, *states: State[Any] | None) -> None:
        self.states, self.set, self.created = list(states), list[State[Any]](), dict[str, Any]()

    def __call__(self, **_: Any) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_run(self, run_id: UUID) -> Any:
        if run_id != RUN:
            raise ObjectNotFound(Exception())
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            raise httpx.ConnectError("refused")
        return SimpleNamespace(id=run_id, name="amber-fox", state=state)

    def set_flow_run_state(self, run_id: UUID, state: State[Any]) -> None:
        self.set.append(state)

    def read_deployment_by_name(self, name: str) -> Any:
        if name != "rebuild-index/birds":
            raise ObjectNotFound(Exception())
        return SimpleNamespace(id=RUN, parameters={"config": {"domain": "birds"}})

    def create_flow_run_from_deployment(self, deployment_id: UUID, parameters: dict[str, Any]) -> Any:
        self.created = parameters
        return SimpleNamespace(id=RUN)

    def read_flow_runs(self, **_: Any) -> list[Any]:
        start = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        took = timedelta(seconds=1.26)
        return [
            SimpleNamespace(id=RUN, name="done", state_name="Skipped", start_time=start, total_run_time=took),
            SimpleNamespace(id=RUN, name="late", state_name=None, start_time=None, total_run_time=timedelta()),
        ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(deployment_runs, "time", SimpleNamespace(sleep=fake.sleep, monotonic=fake))
    return fake


def install(client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setattr(deployment_runs, "get_client", client)
    return client


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (Completed(), 0, "Completed"),
        (Completed(name="Skipped", message="birds is being written"), 0, "Skipped: birds is being written"),
        (Failed(message="no image"), 1, "Failed: no image"),
        (Crashed(message="No heartbeat"), 1, "Crashed: No heartbeat"),
        (Cancelled(), 130, "Cancelled"),
    ],
)
def test_follow_shows_each_state_once_and_returns_the_exit_code(
    end: State[Any], code: int, line: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Client(Pending(), Running(), Running(), None, None, Running(), end), monkeypatch)
    lines: list[str] = []
    assert follow(RUN, lines.append) == code
    assert lines == ["Pending", "Running", line]


def test_follow_fails_after_a_long_outage(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Client(Running(), None), monkeypatch)
    with pytest.raises(StageError, match=r"Prefect's server does not answer: .*; start it with make up"):
        follow(RUN, lambda line: None)
    assert OUTAGE_S < clock.now < OUTAGE_S + 5


def test_follow_of_a_deleted_run_raises_not_found_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(Client(Running()), monkeypatch)
    with pytest.raises(NotFoundError, match="run was deleted: 00000000"):
        follow(UUID(int=0), lambda line: None)


def test_start_run_changes_parameters_of_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    client = install(Client(), monkeypatch)
    assert start_run("rebuild-index/birds", ["urls=more.csv"]).id == RUN
    assert client.created == {"config": {"domain": "birds", "urls": "more.csv"}}
    with pytest.raises(NotFoundError, match="deployment does not exist: birds/birds; run make deploy"):
        start_run("birds", [])


def test_merge_parameters_with_a_field_of_a_text_raises_input_error() -> None:
    with pytest.raises(InputError, match=r"parameter has no fields: domain, in domain\.x=1; set domain=VALUE"):
        merge_parameters({"config": {"domain": "birds"}}, ["domain.x=1"])


def test_list_runs_returns_a_row_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    install(Client(), monkeypatch)
    rows = [tuple(row.values()) for row in list_runs(2)]
    assert rows == [
        (str(RUN), "done", "Skipped", "2026-01-02T03:04:05+00:00", 1.3),
        (str(RUN), "late", "–", "–", 0.0),
    ]


def test_cancel_requests_cancellation_and_rejects_ended_or_unknown_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    client = install(Client(Running()), monkeypatch)
    assert cancel(str(RUN)).name == "amber-fox"
    assert [state.name for state in client.set] == ["Cancelling"]
    install(Client(Completed()), monkeypatch)
    with pytest.raises(InputError, match=r"run has already ended: .* is Completed"):
        cancel(str(RUN))
    with pytest.raises(InputError, match="not the id of a run: birds; see knn-diffusion runs"):
        cancel("birds")
    with pytest.raises(NotFoundError, match="run does not exist"):
        cancel("00000000-0000-0000-0000-000000000000")


def test_link_returns_url_of_the_run_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api", PREFECT_UI_URL: None}):
        assert link(RUN) == f"http://127.0.0.1:4200/runs/flow-run/{RUN}"
