import pytest
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from infra.errors import NotFoundError
from tasks.serve.playground.images import SentImages
from tasks.serve.playground.links import Links
from tasks.serve.playground.state import PageState, problem_of
from tasks.serve.service.requests import EditRequest, GenerateRequest, SearchRequest
from tasks.serve.service.responses import ServedVersion

STATES = [
    PageState(text="a cat & a dog", negative="x=1", database="birds", results=5, min_score=0.25, where="a = 'b'"),
    PageState(tab="search", row=7, row_database="birds", row_version=2),
    PageState(tab="search", image="a-b_c"),
    PageState(tab="generate", text="ä", n=2, seed=3, steps=4, guidance=2.5, start="noise", interpolate_to="b"),
    PageState(tab="compare", text="a", databases=["a,b", "c d"], view="search"),
    PageState(tab="edit", text="a", method="local", edit_strength=0.5),
    PageState(tab="databases"),
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: f"{state.tab}-{state.row}")
def test_query_of_a_state_restores_it(state: PageState) -> None:
    assert PageState.from_query(QueryParams(state.query())) == state


@pytest.mark.parametrize(
    "query",
    ["tab=hack&text=a", "n=100&seed=x&text=a", "databases=1&databases=2&databases=3&databases=4&databases=5&text=a",
     "min_score=nan&text=a", "image=../x&text=a", "row=-1&text=a", f"where={'x' * 3000}&text=a", "unknown=1&text=a"],
)  # fmt: skip
def test_invalid_values_of_a_link_become_the_defaults(query: str) -> None:
    assert PageState.from_query(QueryParams(query)) == PageState(text="a")


def test_query_names_the_seed_that_was_used() -> None:
    assert "seed=5" in PageState(tab="generate", text="a").query(seed=5)
    assert "seed" not in PageState(tab="search", text="a").query(seed=5)


def test_link_keeps_the_seed_of_the_last_run_until_a_setting_changes() -> None:
    links, state = Links(), PageState(tab="generate", text="a")
    ran = links.run(state, 5)
    assert ran == "tab=generate&text=a&seed=5"
    assert links.change(state) == ran
    state.tab = "search"
    assert links.last(state) == "tab=search&text=a"
    assert state.min_score is None  # cosines may be negative
    state.min_score = 0.5
    assert links.change(state) == links.last(state) == "tab=search&text=a&min_score=0.5"
    state.tab = "generate"
    assert links.last(state) == ran
    state.steps = 9
    assert links.change(state) == "tab=generate&text=a&steps=9"


def test_draft_has_what_was_typed_since_the_last_address() -> None:
    links, state = Links(), PageState(text="a")
    links.change(state)
    assert links.draft(state) is None
    state.text = "b"
    typed = PageState.from_query(QueryParams(links.draft(state) or ""))
    assert typed.draft and typed.text == "b" and "draft" not in typed.query()


def test_take_keeps_the_values_of_other_tabs() -> None:
    state = PageState(tab="generate", text="a", steps=9, n=2, results=50)
    state.take(PageState(tab="search", text="b", negative="c", results=7))
    assert (state.tab, state.text, state.negative, state.results) == ("search", "b", "c", 7)
    assert (state.steps, state.n) == (9, 2)


def test_row_problem_names_the_version_that_the_row_belongs_to() -> None:
    birds = ServedVersion(name="birds", version=3, rows=10, generation=0)
    state = PageState()
    assert state.row_problem(birds) is None
    state.set_row(5, birds)
    assert state.row_problem(birds) is None
    for other in (None, birds.model_copy(update={"version": 4}), birds.model_copy(update={"name": "fish"})):
        assert state.row_problem(other) == "That image belongs to birds, version 3."
    assert "does not say which database" in (PageState(row=5).row_problem(birds) or "")


def test_compare_asks_every_database_with_one_seed() -> None:
    asked = PageState(tab="compare", text="a", databases=["x", "y"], candidates=2).requests(None, 9)
    assert {name: (one.database, one.seed) for name, one in asked.items()} == {"x": ("x", 9), "y": ("y", 9)}


def test_search_splits_negative_terms_at_commas() -> None:
    asked = PageState(text="a", negative=" car,, road ,").requests(None, 0)["search"]
    assert isinstance(asked, SearchRequest) and asked.negative == ["car", "road"]


def test_request_without_a_query_is_explained() -> None:
    with pytest.raises(ValidationError) as caught:
        PageState().requests(None, 0)
    assert problem_of(caught.value) == "there is no query; give text, image, row or embedding"


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(database="d", prompt="a", negative_prompt="b", n=3, steps=9, k=4, start="noise", strength=0.5),
        EditRequest(database="d", image=Image.new("RGB", (2, 2)), prompt="a", method="flow", strength=0.4, n=2),
    ],
    ids=["generate", "edit"],
)
def test_recall_restores_the_request_with_the_seed_of_one_image(request_: GenerateRequest | EditRequest) -> None:
    kind = "generate" if isinstance(request_, GenerateRequest) else "edit"
    state = PageState(tab=kind, text="other", steps=1, guidance=3)
    state.recall(request_, 42)
    image = request_.image
    (again,) = state.requests(image, state.seed or 0).values()
    assert again == request_.model_copy(update={"seed": 42})


def test_sent_images_are_bounded_and_reduced() -> None:
    images = SentImages(kept=2)
    tokens = [images.add(Image.new("RGBA", (3_000, 10)), "page") for _ in range(3)]
    with pytest.raises(NotFoundError, match="expired"):
        images.get(tokens[0])
    assert images.get(tokens[2]).size == (1_024, 3)
    assert images.webp(tokens[2])[8:12] == b"WEBP"


def test_sent_images_of_open_pages_survive_those_of_others() -> None:
    images, image = SentImages(kept=2, kept_of_closed=2), Image.new("RGB", (2, 2))
    own = images.add(image, "page")
    for other in ("a", "b", "c"):
        closed = [images.add(image, other) for _ in range(2)]
        images.close(other)
    assert own in images and all(token in images for token in closed)
    images.close("page")
    images.claim(own, "reloaded")
    later = images.add(image, "d")
    for page in ("d", "reloaded"):
        images.close(page)
    assert closed[0] not in images and own in images and later in images
