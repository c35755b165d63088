"""Requests that schemathesis generates from the service's OpenAPI description."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from support.fake_engine import FakeEngine
from support.served_app import served

EXAMPLES = 12
"""Generated requests of each operation."""


def test_generated_requests_cause_no_server_error() -> None:
    with served(FakeEngine(capacity=1_000, step_s=0)) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 18
        for operation in operations:
            check(operation)


def check(operation: schemathesis.APIOperation) -> None:
    """Send generated requests of one operation, the same ones in each run."""

    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        response = case.call_and_validate(checks=[not_a_server_error])
        assert "Traceback" not in response.text

    send()
