"""The engine on a real registry and real files: filters, images, takedowns, deletion, and aliases that move."""

import base64
import http.server
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from support.fakes import share_encoder
from support.stored_root import FOLDERS, unpack_root
from support.tiny_service import wait_for

from infra.errors import InputError, IntegrityError, NotFoundError
from infra.promotions import Decision, Promotions
from infra.settings import Settings
from tasks.references.database import open_database
from tasks.references.domain_folder import DomainFolder
from tasks.references.images import fetch_images
from tasks.references.takedown import Entries
from tasks.references.types import DatabaseVersion
from tasks.serve.service.admin import admin_view, mlflow_address, prefect_address, running_flows
from tasks.serve.service.config import ServiceConfig
from tasks.serve.service.engine import Engine
from tasks.serve.service.errors import DatabaseUnavailableError
from tasks.serve.service.requests import GenerateRequest, SearchRequest
from tasks.serve.service.responses import ImagesResponse, SearchResponse
from tasks.serve.service.served import OpenDatabase
from tasks.upkeep.takedown import commit_takedown


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    share_encoder(monkeypatch)
    return Settings(root=str(unpack_root(tmp_path / "root")), cache=tmp_path / "cache")


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[..., Engine]]:
    """Start engines that are closed at the end; they look at the registry only when a test says so."""
    started: list[Engine] = []

    def start(*databases: str, poll_s: float = 3600) -> Engine:
        engine = Engine.open(ServiceConfig(databases=databases, poll_s=poll_s), settings)
        started.append(engine)
        engine.start()
        wait_for(lambda: engine.ready or bool(engine.problems()))
        return engine

    yield start
    for engine in started:
        engine.close(0)


def search(engine: Engine, **fields: object) -> SearchResponse:
    response = engine.submit(SearchRequest.model_validate({"text": "a green circle"} | fields)).future.result(20)
    assert isinstance(response, SearchResponse)
    return response


def names(response: SearchResponse) -> set[str]:
    return {str(hit.url).rpartition("/")[2] for hit in response.hits}


def move_champion(settings: Settings, version: int) -> None:
    client = MlflowClient(settings.tracking_uri, settings.tracking_uri)
    client.set_registered_model_alias("knn-database.shapes", "champion", str(version))


def test_search_with_filter_equals_comparison_of_all_matching_rows(start: Callable[..., Engine]) -> None:
    engine = start("shapes")
    found = search(engine, k=20, where="url like '%circle%' and width >= 10")
    everything = search(engine, k=20)
    expected = [hit.id for hit in everything.hits if "circle" in str(hit.url)]
    assert [hit.id for hit in found.hits] == expected
    assert len(expected) < len(everything.hits)
    assert search(engine, where="width > 10000").hits == []
    for wrong in ("width >", "nothing = 1"):
        with pytest.raises(InputError, match="the filter"):
            search(engine, where=wrong)


def test_generation_starts_from_stored_images_and_thumbnails_show_them(
    start: Callable[..., Engine], settings: Settings
) -> None:
    engine = start("shapes")
    response = engine.submit(GenerateRequest(prompt="a red circle", steps=2, seed=1)).future.result(20)
    assert isinstance(response, ImagesResponse)
    assert response.settings["start"] == "neighbour"
    version = DatabaseVersion.open(f"{settings.root}/{FOLDERS['champion database']}")
    row = response.images[0].neighbours[0].id
    (stored,) = fetch_images(version, [row], settings.cache_folder)
    shown = Image.open(io.BytesIO(engine.thumbnail("shapes", row))).convert("RGB")
    assert shown.size == stored.size
    assert np.abs(np.asarray(shown).astype(float) - np.asarray(stored)).mean() < 12


def test_takedown_hides_rows_at_the_next_look_without_a_new_version(
    start: Callable[..., Engine], settings: Settings
) -> None:
    engine = start("shapes")
    before = search(engine, k=20)
    url = str(before.hits[0].url)
    commit_takedown(Entries(url=frozenset({url})), DomainFolder.of(settings, "shapes"), info={})
    engine._watcher.look()
    after = search(engine, k=20)
    assert names(after) == names(before) - {url.rpartition("/")[2]}
    assert (after.database.version, after.database.rows) == (before.database.version, before.database.rows - 1)
    assert names(search(engine, k=20, where="width > 0")) == names(after)
    with pytest.raises(NotFoundError):
        engine.thumbnail("shapes", before.hits[0].id)
    with pytest.raises(InputError, match="has no row"):
        engine.submit(SearchRequest(row=before.hits[0].id))


def test_older_version_hides_what_was_taken_down_later(settings: Settings) -> None:
    version = DatabaseVersion.open(f"{settings.root}/{FOLDERS['grown database']}")
    plain = open_database(version, settings.cache_folder)
    opened = OpenDatabase.open(version, settings.cache_folder, name="shapes", number=2)
    (hidden,) = set(plain.ids().tolist()) - set(opened.database.ids().tolist())
    assert plain.describe([hidden])[0]["url"].endswith("green-circle.png")
    assert not opened.hide_taken_down(), "nothing is new"


def test_moved_champion_is_served_by_the_polling_thread(start: Callable[..., Engine], settings: Settings) -> None:
    engine = start("shapes", poll_s=0.05)
    assert search(engine).database.version == 3
    move_champion(settings, 1)
    wait_for(lambda: search(engine).database.version == 1)
    served = engine.databases()[0]
    assert (served.champion, served.versions, served.served is not None) == (1, [1, 2, 3], True)


def test_damaged_version_leaves_the_old_one_served(start: Callable[..., Engine], settings: Settings) -> None:
    engine = start("shapes")
    index = next(Path(settings.root, FOLDERS["grown database"], "index").glob("*.faiss"))
    index.write_bytes(index.read_bytes()[:-8] + b"\xff" * 8)
    move_champion(settings, 2)
    engine._watcher.look()
    assert search(engine).database.version == 3
    (line,) = engine.problems()
    assert line.startswith("the new version of shapes does not open: …")
    assert settings.root not in line
    with pytest.raises(IntegrityError):
        engine.swap("shapes", 2)
    assert engine.swap("shapes", 1).served is not None
    assert engine.problems() == []


def test_registry_that_disappears_and_returns(start: Callable[..., Engine], settings: Settings) -> None:
    engine = start("shapes")
    registry = Path(settings.root, "mlflow.db")
    registry.rename(registry.with_suffix(".away"))
    engine._watcher.look()
    assert engine.problems() == [
        "the registry does not answer, what is served remains: the registry has disappeared; restore it"
    ]
    assert search(engine).hits
    assert not registry.exists(), "looking must not create an empty registry"
    registry.with_suffix(".away").rename(registry)
    engine._watcher.look()
    assert engine.problems() == []


def test_database_that_was_deleted_keeps_answering_from_its_open_files(
    start: Callable[..., Engine], settings: Settings
) -> None:
    engine = start("shapes", "plain")
    before = search(engine, k=20)
    expected = engine.submit(GenerateRequest(prompt="a red circle", steps=2, seed=1)).future.result(20)
    for name in ("shapes", "plain"):
        shutil.rmtree(Path(settings.root, name))
    assert search(engine, k=20).model_dump() == before.model_dump()
    assert engine.thumbnail("shapes", before.hits[0].id)
    again = engine.submit(GenerateRequest(prompt="a red circle", steps=2, seed=1)).future.result(20)
    assert again.model_dump() == expected.model_dump()
    with pytest.raises(DatabaseUnavailableError, match="database shapes cannot answer: …"):
        search(engine, where="width > 0")  # reads metadata that is not kept in memory
    engine._watcher.look()
    assert engine.problems() == [
        f"the files of {name} were deleted; swap to another version, or restore them" for name in ("shapes", "plain")
    ]
    assert search(engine, k=20).model_dump() == before.model_dump()


def test_admin_view_has_versions_and_promotions(
    start: Callable[..., Engine], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_UI_URL", raising=False)
    engine = start("shapes")
    decision = Decision(
        name="knn-database.shapes", version=3, outcome="rolled-back", before=3, after=2, requester="me", reason="odd"
    )
    Promotions(settings).record(decision, "")
    view = admin_view(engine, settings)
    assert [one.name for one in view.databases] == ["shapes", "plain"]
    assert (view.promotions[0].name, view.promotions[0].reason, view.promotions[0].after) == ("shapes", "odd", 2)
    assert (view.mlflow, view.prefect, view.flows) == (None, None, [])


def test_takedown_is_applied_while_searches_run(start: Callable[..., Engine], settings: Settings) -> None:
    engine, ended, seen = start("shapes"), threading.Event(), list[set[str]]()
    url = str(search(engine).hits[0].url)

    def client() -> None:
        while not ended.is_set():
            seen.append(names(search(engine, k=20)))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    commit_takedown(Entries(url=frozenset({url})), DomainFolder.of(settings, "shapes"), info={})
    engine._watcher.look()
    after = len(seen)
    wait_for(lambda: len(seen) > after + 20)
    ended.set()
    for thread in threads:
        thread.join(20)
    hidden = url.rpartition("/")[2]
    assert not any(hidden in found for found in seen[after + 4 :]), "at most the running searches still find it"


class _Prefect(http.server.BaseHTTPRequestHandler):
    """Fake of Prefect's API with one running flow; any other user than ``me`` is rejected."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:secret").decode()
        self.send_response(200 if known and self.path == "/api/flow_runs/filter" else 401)
        self.end_headers()
        self.wfile.write(b'[{"id": "7", "name": "rebuild-index-birds", "start_time": "2026-01-01T00:00:00Z"}]')

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_running_flows_come_from_prefect_if_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Prefect) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        monkeypatch.delenv("PREFECT_UI_URL", raising=False)
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:secret")
        assert prefect_address() == address
        (run,) = running_flows(address)
        assert (run.name, run.page) == ("rebuild-index-birds", f"{address}/runs/flow-run/7")
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:wrong")
        assert running_flows(address) == []
        server.shutdown()
    assert running_flows(address) == [], "nothing listens any more"


def test_addresses_have_no_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlflow_address(Settings(MLFLOW_TRACKING_URI="http://me:secret@mlflow:5000")) == "http://mlflow:5000"
    monkeypatch.setenv("PREFECT_UI_URL", "https://me:secret@prefect.example.com/")
    assert prefect_address() == "https://prefect.example.com"
