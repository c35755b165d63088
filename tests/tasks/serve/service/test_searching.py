"""Searches of the engine, on tiny models."""

import numpy as np
import pytest
from support.tiny_service import ROWS, SOURCE, search

from infra.errors import InputError
from tasks.serve.service import searching
from tasks.serve.service.engine import Engine
from tasks.serve.service.plans import plan
from tasks.serve.service.requests import SearchRequest


def test_search_returns_nearest_rows_with_version_and_urls(engine: Engine) -> None:
    found = search(engine, text="an owl", k=3, database="birds")
    scores = [hit.score for hit in found.hits]
    assert scores == sorted(scores, reverse=True)
    assert (found.database.name, found.database.version, found.database.rows) == ("birds", 2, ROWS)
    assert [hit.rank for hit in found.hits] == [1, 2, 3]
    assert found.model == "knn-diffusion/1"
    assert {name: value for name, value in found.settings.items() if value} == {"text": "an owl", "k": 3}
    assert all(hit.url == f"http://birds/2/{hit.id}" for hit in found.hits)


def test_search_of_a_row_returns_the_others(engine: Engine) -> None:
    found = search(engine, row=4, k=ROWS, database="birds")
    assert sorted(hit.id for hit in found.hits) == [row for row in range(ROWS) if row != 4]


def test_search_combines_text_image_and_row_and_subtracts_negative_texts(engine: Engine) -> None:
    opened, model = engine._catalog.get("birds"), engine._catalog.model
    text, away = model.encoder.embed_texts(["an owl", "night"]).numpy()
    image = model.encoder.embed_images([SOURCE]).numpy()[0]
    row = opened.database.rows(np.array([5]))[0].astype(np.float32)
    query = (text + image + row) / 3 - away
    found = search(engine, text="an owl", image=SOURCE, row=5, negative=["night"], k=2, database="birds")
    nearest = opened.database.nearest((query / np.linalg.norm(query))[None].astype(np.float32), 3)
    expected = [identifier for identifier in nearest.ids[0].tolist() if identifier != 5][:2]
    assert [hit.id for hit in found.hits] == expected


def test_search_of_an_embedding_equals_that_of_its_row(engine: Engine) -> None:
    row = engine._catalog.get("birds").database.rows(np.array([5]))[0].astype(float)
    found = search(engine, embedding=(7 * row).tolist(), k=3, database="birds")
    assert found.hits[0].id == 5
    assert found.hits[1:] == [
        hit.model_copy(update={"rank": hit.rank + 1}) for hit in search(engine, row=5, k=2, database="birds").hits
    ]
    assert found.settings["embedding_sha256"]


def test_search_leaves_out_rows_below_the_lowest_score(engine: Engine) -> None:
    everything = search(engine, text="an owl", k=ROWS)
    limit = everything.hits[2].score
    assert [hit.id for hit in search(engine, text="an owl", k=ROWS, min_score=limit).hits] == [
        hit.id for hit in everything.hits[:3]
    ]


def test_searches_of_a_batch_equal_single_ones(engine: Engine) -> None:
    requests = [SearchRequest(text=f"text {number}", k=number + 1) for number in range(8)]
    single = [engine.submit(request).future.result(20) for request in requests]
    opened, model = engine._catalog.get(None), engine._catalog.model
    plans = [plan(request, opened, model) for request in requests]
    together = searching.search(plans)  # type: ignore[arg-type]
    assert [one.model_dump() for one in together] == [one.model_dump() for one in single]  # type: ignore[union-attr]


def test_search_by_negative_text_alone_that_cancels_the_query_is_invalid(engine: Engine) -> None:
    with pytest.raises(InputError, match="cancel each other"):
        search(engine, text="an owl", negative=["an owl"])
