"""Fixtures shared by the tests of several stages."""

from collections.abc import Iterator

import pytest
from support.fakes import WithoutRay

from infra import compute


@pytest.fixture
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WithoutRay]:
    """Run workers in this process, except in tests marked ``on_ray``."""
    fake = WithoutRay()
    if "on_ray" not in request.keywords:
        fake.install(monkeypatch)
    with compute.cluster(None, 2):
        yield fake
