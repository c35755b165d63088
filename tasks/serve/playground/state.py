"""State of the page. The URL holds it, so that a link reproduces the page; it names an image by a token."""

import secrets
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlencode

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams

from tasks.serve.service.requests import (
    MAX_IMAGES,
    MAX_NEIGHBOURS,
    MAX_PROMPT_CHARACTERS,
    EditRequest,
    GenerateRequest,
    Request,
    SearchRequest,
)
from tasks.serve.service.responses import ServedVersion

MAX_COMPARED = 4
"""Maximum databases side by side."""
MAX_TERMS = 8

Tab: TypeAlias = Literal["search", "generate", "compare", "edit", "databases"]
TABS: tuple[Tab, ...] = ("search", "generate", "compare", "edit", "databases")
_Name: TypeAlias = Annotated[str, Field(max_length=200)]

_QUERY = ("text", "image")
_COMMON = (*_QUERY, "database")
_DRAWN = ("n", "seed", "steps", "guidance", "neighbours")
_SHOWN: dict[Tab, tuple[str, ...]] = {
    "search": (*_COMMON, "negative", "row", "row_database", "row_version", "results", "min_score", "where"),
    "generate": (*_COMMON, *_DRAWN, "negative", "quality", "candidates", "start", "strength", "interpolate_to"),
    "compare": (*_QUERY, *_DRAWN, "negative", "databases", "view", "quality", "candidates", "start", "strength"),
    "edit": (*_COMMON, *_DRAWN, "method", "edit_strength"),
    "databases": (),
}
"""Fields of each tab, in the order of the URL."""


class PageState(BaseModel):
    """Values of the controls. None means the generator's default.

    ``image`` is the token of the prompt's image, ``row`` the stored row of "more like this", with the database
    and the version that it belongs to. A link with ``draft`` fills the controls and runs nothing.
    """

    model_config = ConfigDict(validate_assignment=True, extra="ignore")

    tab: Tab = "search"
    draft: bool = False
    text: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    image: str = Field("", max_length=64, pattern=r"^[\w-]*$")
    negative: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    database: _Name | None = None
    databases: list[_Name] = Field([], max_length=MAX_COMPARED)
    view: Literal["generate", "search"] = "generate"
    row: int | None = Field(None, ge=0)
    row_database: _Name | None = None
    row_version: int | None = Field(None, ge=0)
    results: int = Field(24, ge=1, le=MAX_NEIGHBOURS)
    min_score: float | None = Field(None, ge=0, le=1)
    where: str = Field("", max_length=2_000)
    n: int = Field(4, ge=1, le=MAX_IMAGES)
    seed: int | None = Field(None, ge=0, lt=2**53)  # a browser's numbers are exact below it
    steps: int | None = Field(None, ge=1, le=250)
    guidance: float | None = Field(None, ge=1, le=50)
    quality: Literal["fast", "best"] = "fast"
    candidates: int | None = Field(None, ge=1, le=16)
    neighbours: int | None = Field(None, ge=1, le=100)
    start: Literal["neighbour", "noise"] | None = None
    strength: float | None = Field(None, gt=0, le=1)
    interpolate_to: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    method: Literal["flow", "local", "restore", "sdedit"] | None = None
    edit_strength: float | None = Field(None, gt=0, le=1)

    @classmethod
    def from_query(cls, query: QueryParams) -> "PageState":
        """Return the state of a URL. Invalid values become the defaults, because links are typed and cut by people."""
        given: dict[str, Any] = {name: query[name] for name in query if name in cls.model_fields}
        if "databases" in given:
            given["databases"] = query.getlist("databases")
        try:
            return cls(**given)
        except ValidationError as error:
            invalid = {str(one["loc"][0]) for one in error.errors()}
            return cls(**{name: value for name, value in given.items() if name not in invalid})

    def query(self, *, seed: int | None = None) -> str:
        """Return the URL query of the tab's values that differ from the defaults, with ``seed`` if there is one."""
        return self._encoded(_SHOWN[self.tab], seed)

    def settings(self) -> str:
        """Return the query without what only hides results: two states with equal settings send equal requests."""
        return self._encoded([name for name in _SHOWN[self.tab] if name != "min_score"])

    def _encoded(self, names: Iterable[str], seed: int | None = None) -> str:
        values = {name: getattr(self, name) for name in names}
        if seed is not None and "seed" in values:
            values["seed"] = seed
        defaults = PageState()
        changed = {name: value for name, value in values.items() if value != getattr(defaults, name)}
        return urlencode({"tab": self.tab, **changed}, doseq=True)

    def take(self, other: "PageState") -> None:
        """Take the tab of another state and the values of that tab. Those of other tabs remain."""
        for name in ("tab", *_SHOWN[other.tab]):
            setattr(self, name, getattr(other, name))

    def requests(self, image: Image.Image | None, seed: int) -> dict[str, Request]:
        """Return the requests of the tab by their titles. Raises ``ValidationError`` if one is invalid."""
        if self.tab == "compare":
            make = self._search if self.view == "search" else self._generate
            return {name: make(image, name, seed) for name in self.databases}
        if self.tab == "edit":
            return {"edit": self._edit(image, seed)}
        make = self._search if self.tab == "search" else self._generate
        return {self.tab: make(image, self.database, seed)}

    def _search(self, image: Image.Image | None, database: str | None, seed: int) -> Request:
        compared = self.tab == "compare"
        return SearchRequest(
            database=database,
            text=self.text.strip() or None,
            image=image,
            row=None if compared else self.row,
            negative=self.terms(),
            k=min(self.n * 2, MAX_NEIGHBOURS) if compared else self.results,
            where=None if compared else self.where.strip() or None,
        )

    def _generate(self, image: Image.Image | None, database: str | None, seed: int) -> Request:
        leads = self.interpolate_to.strip() if self.tab == "generate" else ""
        return GenerateRequest(
            database=database,
            prompt=self.text.strip() or None,
            image=image,
            negative_prompt=self.negative.strip() or None,
            n=self.n,
            seed=seed,
            steps=self.steps,
            guidance=self.guidance,
            quality=self.quality,
            candidates=self.candidates,
            k=self.neighbours,
            start=self.start,
            strength=self.strength,
            interpolate_to=leads or None,
        )

    def _edit(self, image: Image.Image | None, seed: int) -> Request:
        return EditRequest(
            database=self.database,
            image=image,  # None is an error with a message
            prompt=self.text.strip(),
            n=self.n,
            seed=seed,
            method=self.method,
            strength=self.edit_strength,
            steps=self.steps,
            guidance=self.guidance,
            k=self.neighbours,
        )

    def set_row(self, row: int | None, database: ServedVersion | None = None) -> None:
        """Set or remove the stored row of "more like this"."""
        self.row = row
        self.row_database = None if database is None else database.name
        self.row_version = None if database is None else database.version

    def row_problem(self, served: ServedVersion | None) -> str | None:
        """Return why the stored row is not one of ``served``, the version that would be searched; None if it is one."""
        if self.row is None or (served is not None and (served.name, served.version) == self._row_owner):
            return None
        name, version = self._row_owner
        if name is None:
            return f"The link does not say which database image {self.row} belongs to. Search for it again."
        return f"That image belongs to {name}{'' if version is None else f', version {version}'}."

    @property
    def _row_owner(self) -> tuple[str | None, int | None]:
        return self.row_database, self.row_version

    def terms(self) -> list[str]:
        """Return the negative terms, which commas separate."""
        return [term.strip() for term in self.negative.split(",") if term.strip()][:MAX_TERMS]

    def recall(self, request: Request, seed: int) -> None:
        """Set the controls to those of an earlier request, with the seed of one of its images."""
        self.seed = seed
        self.database = request.database or self.database
        self.n = getattr(request, "n", self.n)
        if isinstance(request, GenerateRequest):
            self.text, self.negative = request.prompt or "", request.negative_prompt or ""
            self.interpolate_to = request.interpolate_to or ""
            self.start, self.strength, self.candidates = request.start, request.strength, request.candidates
            self.quality = request.quality
        if isinstance(request, EditRequest):
            self.text, self.method, self.edit_strength = request.prompt, request.method, request.strength
        if isinstance(request, GenerateRequest | EditRequest):
            self.steps, self.guidance, self.neighbours = request.steps, request.guidance, request.k


def new_seed() -> int:
    """Return a random seed that people can read out."""
    return secrets.randbelow(1_000_000)


def problem_of(error: ValidationError) -> str:
    """Return the first problem of a request as a sentence, without pydantic's wording."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
