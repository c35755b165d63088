"""Tests of the promotion state: pins, aliases moved by hand, and processes killed while they move an alias."""

from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from support.fakes import Killed

from infra.promotions import Promotions
from infra.settings import Settings

NAME = "knn-database.twemoji"


@pytest.fixture
def client(mlflow_settings: Settings) -> MlflowClient:
    """A registry with three versions; the first is the champion."""
    store = MlflowClient(mlflow_settings.tracking_uri, mlflow_settings.tracking_uri)
    store.create_registered_model(NAME)
    for number in (1, 2, 3):
        store.create_model_version(NAME, f"{mlflow_settings.root}/{number}")
    Promotions(mlflow_settings).move(NAME, 1)
    return store


def test_pin_of_an_alias_moved_by_hand_names_the_version(client: MlflowClient, mlflow_settings: Settings) -> None:
    assert Promotions(mlflow_settings).pin(NAME) is None
    client.set_registered_model_alias(NAME, "champion", "3")
    assert Promotions(mlflow_settings).pin(NAME) == "the alias was moved to version 3 by hand"
    Promotions(mlflow_settings).move(NAME, 2)
    assert Promotions(mlflow_settings).pin(NAME) is None


@pytest.mark.parametrize("calls", range(4))
def test_move_killed_after_any_call_is_not_taken_for_a_move_by_hand(
    client: MlflowClient, mlflow_settings: Settings, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    made: list[str] = []

    def killing(method: str) -> Any:
        original = getattr(MlflowClient, method)

        def call(self: MlflowClient, *args: Any) -> Any:
            if len(made) == calls:
                raise Killed
            made.append(method)
            return original(self, *args)

        return call

    with monkeypatch.context() as patch:
        for method in ("set_registered_model_tag", "set_registered_model_alias"):
            patch.setattr(MlflowClient, method, killing(method))
        if calls < 3:
            with pytest.raises(Killed):
                Promotions(mlflow_settings).move(NAME, 2)
        else:
            Promotions(mlflow_settings).move(NAME, 2)
    assert Promotions(mlflow_settings).champion(NAME) == (2 if "set_registered_model_alias" in made else 1)
    assert Promotions(mlflow_settings).pin(NAME) is None


def test_undecided_is_a_candidate_without_a_decision_or_approved_since(
    client: MlflowClient, mlflow_settings: Settings
) -> None:
    store = Promotions(mlflow_settings)
    assert (store.names(), store.undecided(NAME), store.undecided("knn-diffusion")) == ([], None, None)
    client.set_registered_model_alias(NAME, "candidate", "2")
    assert (store.names(), store.undecided(NAME)) == ([NAME], 2)
    for state in ("refused", "pending"):
        client.set_model_version_tag(NAME, "2", "promotion.state", state)
        assert store.undecided(NAME) is None
    client.set_model_version_tag(NAME, "2", "approval", "approved")
    assert store.undecided(NAME) == 2
    store.move(NAME, 1, pin="rolled back")
    assert store.undecided(NAME) is None
    store.move(NAME, 2)
    assert (store.names(), store.undecided(NAME)) == ([], None)
