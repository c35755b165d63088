"""Requests that schemathesis generates from the service's OpenAPI description."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from support.fake_engine import FakeEngine
from support.served_app import served
from support.tiny_service import TinyVersions

from tasks.serve.service.config import ServiceConfig
from tasks.serve.service.engine import Engine
from tasks.serve.service.requests import GenerateRequest

EXAMPLES, EXAMPLES_OF_ENGINE = 12, 8
"""Generated requests of each operation."""
TIMEOUT_S = 20


def test_generated_requests_cause_no_server_error() -> None:
    with served(FakeEngine(capacity=1_000, step_s=0)) as address:
        for operation in operations_of(address):
            check(operation, EXAMPLES, lambda case: case)


def test_generated_requests_of_existing_things_cause_no_server_error(tmp_path: Path) -> None:
    engine = Engine(TinyVersions(tmp_path, birds=2, cats=1), ServiceConfig())
    with served(engine) as address:
        job = engine.submit(GenerateRequest(prompt="an owl"), keep=True)
        job.future.result(TIMEOUT_S)
        for operation in operations_of(address):
            check(operation, EXAMPLES_OF_ENGINE, lambda case: aimed(case, job.id), str(tmp_path), "/srv/")
        assert engine.problems() == []


def operations_of(address: str) -> list[schemathesis.APIOperation]:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 18
    return operations


def check(
    operation: schemathesis.APIOperation,
    examples: int,
    aim: Callable[[schemathesis.Case], schemathesis.Case],
    *secrets: str,
) -> None:
    """Send generated requests of one operation, the same ones in each run. About half of them are aimed."""

    @given(case=operation.as_strategy(), is_aimed=st.booleans())
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case, is_aimed: bool) -> None:
        case = aim(case) if is_aimed else case
        response = case.call_and_validate(checks=[not_a_server_error], timeout=TIMEOUT_S)
        found = [one for one in ("Traceback", "site-packages", ".py", *secrets) if one in response.text]
        assert not found, response.text

    send()


def aimed(case: schemathesis.Case, job: str) -> schemathesis.Case:
    """Make a request name what exists: a database, a job, an image. Otherwise it hardly reaches the engine."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (200, 40, 40)).save(buffer, "PNG")
    for name, value in (("name", "birds"), ("job", job)):
        if name in case.path_parameters:
            case.path_parameters[name] = value
    body: Any = case.body
    if isinstance(body, dict):
        for name, value in (("database", "birds"), ("image", base64.b64encode(buffer.getvalue()).decode())):
            if name in body:
                body[name] = value
    return case
