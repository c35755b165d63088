"""What tests of several stages share."""

from collections.abc import Iterator

import pytest
from support.fakes import WithoutRay

from infra import compute


@pytest.fixture
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WithoutRay]:
    """Workers in this process, except for the tests that are about them."""
    fake = WithoutRay()
    if "on_ray" not in request.keywords:
        fake.install(monkeypatch)
    with compute.cluster(None, 2):
        yield fake
