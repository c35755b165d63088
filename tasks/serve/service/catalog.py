"""The versions that are served now, and their replacement.

A swap opens and verifies the new version first, and then replaces one reference. Requests keep the version that they
were submitted with, so none is lost and none sees two versions. A version that does not open changes nothing.
"""

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from infra import logs
from infra.errors import (
    ConfigError,
    EncoderMismatchError,
    InputError,
    KNNDiffusionError,
    NotFoundError,
    StageError,
    TransientError,
)
from infra.registry_tags import CHAMPION, GENERATOR_NAME
from model.errors import ModelError
from tasks.serve.service.config import ServiceConfig
from tasks.serve.service.errors import UnknownDatabaseError, expected_errors, public_message
from tasks.serve.service.generator import OpenModel
from tasks.serve.service.metrics import Metrics
from tasks.serve.service.responses import ServedDatabase
from tasks.serve.service.served import OpenDatabase
from tasks.serve.service.versions import Followed, Listing, Versions, default_databases, default_model

Opened = TypeVar("Opened", OpenDatabase, OpenModel)
MODEL = "the model"
"""Key of the model in :attr:`Catalog.problems`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A served database: what is followed, the target that was last seen, and the open version."""

    followed: Followed
    seen: int | None
    opened: OpenDatabase


class Catalog:
    """The served databases by name, and the served model. Thread-safe; reading never waits for a swap."""

    def __init__(self, versions: Versions, config: ServiceConfig, metrics: Metrics) -> None:
        """Open the model and the databases of the config.

        Raises:
            NotFoundError: A name is not registered, or no database is.
            ConfigError: Two of the databases have the same name.
            EncoderMismatchError: A named database was made by another encoder than the model's.
            KNNDiffusionError: A version does not open.
            ModelError: A version does not open.
        """
        self._versions, self._metrics = versions, metrics
        self._swapping = threading.RLock()
        self._live: weakref.WeakSet[OpenDatabase] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._swap_listings = 0
        self._entries: dict[str, Entry] = {}
        self.problems: dict[str, str] = {}
        self.listing = versions.listing()
        self.followed_model = Followed.parse(config.model or default_model(self.listing), "generator")
        self.follows_default = config.model is None
        self.seen_model = self.listing.target("generator", self.followed_model)
        self._model = versions.open_model(self.followed_model, self.seen_model, 0)
        for reference in config.databases or default_databases(self.listing):
            self._open_first(reference, required=bool(config.databases))
        if not self._entries:
            raise NotFoundError(f"no database can be served: {'; '.join(self.problems.values())}")
        self._show_serving()

    @property
    def model(self) -> OpenModel:
        """The served model."""
        return self._model

    @property
    def entries(self) -> dict[str, Entry]:
        """The served databases by name; the first is the default."""
        return self._entries

    def get(self, name: str | None) -> OpenDatabase:
        """Return the served version of a database. Raises ``UnknownDatabaseError``."""
        entries = self._entries
        if name is None:
            return next(iter(entries.values())).opened
        if name not in entries:
            raise UnknownDatabaseError(f"no database is served as {name!r}; served: {', '.join(entries)}")
        return entries[name].opened

    def live(self) -> list[OpenDatabase]:
        """Return all open versions, also replaced ones that requests still use."""
        with self._lock:  # adding to the set while another thread lists it raises RuntimeError
            return list(self._live)

    def databases(self) -> list[ServedDatabase]:
        """Return the served databases, and then the registered ones that are not served."""
        entries, listing = self._entries, self.listing
        names = [*entries, *(name for name in sorted(listing.databases) if name not in entries)]
        return [self._served(name, entries.get(name), listing) for name in names]

    def swap(self, name: str, version: int | None = None) -> ServedDatabase:
        """Serve another version of a database, by default its champion, or start to serve a registered one.

        Raises:
            UnknownDatabaseError: No database is served or registered under the name.
            NotFoundError: There is no such version.
            InputError: A version is given for a database that is served from a folder.
            TransientError: The registry or the storage does not answer.
            EncoderMismatchError: The version was made by another encoder. As in all cases, the present one remains.
            IntegrityError: A file of the version is missing or damaged.
            StageError: The version does not open for another reason.
        """
        with self._swapping:
            listing = self._list_for_swap()
            entry = self._entries.get(name)
            if entry is None and name not in listing.databases:
                raise UnknownDatabaseError(f"no database is registered as {name!r}; see the list of databases")
            followed = entry.followed if entry is not None else Followed.parse(name, "database")
            if version is not None and followed.name is None:
                raise InputError(f"database {name} is a folder without versions: {version}; omit the version")
            target = version
            if version is None and followed.name is not None:
                target = listing.target("database", dataclasses.replace(followed, alias=followed.alias or CHAMPION))
                if target is None:
                    raise NotFoundError(f"database {name} has no champion; name a version")
            seen = listing.target("database", followed)
            self._serve(name, followed, target, seen, is_problem=version is None)
            return self._served(name, self._entries[name], listing)

    def refresh(self) -> None:
        """Read the registry. Raises ``TransientError``.

        A swap by hand reads it too. What was read before such a swap is dropped, or it would undo the swap.
        """
        known = self._swap_listings
        listing = self._versions.listing()
        with self._lock:
            if self._swap_listings == known:
                self.listing = listing

    def follow(self, name: str) -> None:
        """Serve the version that the alias of a served database names, unless it was seen before.

        A version that does not open is recorded as a problem. It is tried again once the alias moves, and at the next
        call after a failure that may pass.
        """
        with self._swapping:  # a swap may hold it for minutes, so the target is read afterwards
            entry = self._entries[name]
            target = self.listing.target("database", entry.followed)
            if entry.followed.alias is None or target in (None, entry.seen):
                return
            try:
                self._serve(name, entry.followed, target, target)
            except TransientError:
                return
            except (KNNDiffusionError, ModelError):
                self._entries = {**self._entries, name: dataclasses.replace(entry, seen=target)}

    def follow_model(self) -> None:
        """Serve the version of the model that its alias names. As :meth:`follow`, also if an encoder differs."""
        with self._swapping:
            followed = self._followed_model()
            target = self.listing.target("generator", followed)
            if followed.alias is None or target in (None, self.seen_model):
                return
            try:
                self._serve_model(followed, target)
            except TransientError:
                return
            except (KNNDiffusionError, ModelError):
                self.seen_model = target

    def _list_for_swap(self) -> Listing:
        listing = self._versions.listing()
        with self._lock:
            self.listing = listing
            self._swap_listings += 1
        return listing

    def _serve(
        self, name: str, followed: Followed, target: int | None, seen: int | None, *, is_problem: bool = True
    ) -> None:
        """Serve the version ``target`` of a database, whose alias names ``seen``. Raises as :meth:`swap`."""
        entry = self._entries.get(name)
        if entry is not None and target is not None and entry.opened.version == target:
            self._entries = {**self._entries, name: dataclasses.replace(entry, seen=seen)}
            self.problems.pop(name, None)
            return
        generation = 0 if entry is None else entry.opened.generation + 1

        def open_version() -> OpenDatabase:
            opened = self._versions.open_database(followed, target, generation)
            self._require_same_space(opened, self._model)
            return opened

        opened = self._timed(name, "database", open_version, is_problem=is_problem)
        self._add_live(opened)
        self._entries = {**self._entries, name: Entry(followed=followed, seen=seen, opened=opened)}
        self._show_serving()

    def _serve_model(self, followed: Followed, target: int | None) -> None:
        """Serve a version of the model. Raises as :meth:`swap`, also if the encoder of a database differs."""

        def open_version() -> OpenModel:
            model = self._versions.open_model(followed, target, self._model.generation + 1)
            for entry in self._entries.values():
                self._require_same_space(entry.opened, model)
            return model

        self._model = self._timed(MODEL, "model", open_version)
        self.followed_model, self.seen_model = followed, target
        self._show_serving()

    def _followed_model(self) -> Followed:
        """Return what the model follows now; without a named model, the registered one once it has a champion."""
        if self.follows_default and self.followed_model.name is None:
            registered = Followed.parse(GENERATOR_NAME, "generator")
            if self.listing.target("generator", registered) is not None:
                return registered
        return self.followed_model

    def _open_first(self, reference: str, *, required: bool) -> None:
        followed = Followed.parse(reference, "database")
        target = self.listing.target("database", followed)
        try:
            with expected_errors():
                opened = self._versions.open_database(followed, target, 0)
            self._require_same_space(opened, self._model)
        except (KNNDiffusionError, ModelError) as error:
            if required:
                raise
            self.problems[reference] = f"{reference} is not served: {public_message(error)}"
            return
        if opened.name in self._entries:
            raise ConfigError(f"two databases have the name {opened.name}; serve one of them")
        self._add_live(opened)
        self._entries[opened.name] = Entry(followed=followed, seen=target, opened=opened)

    def _add_live(self, opened: OpenDatabase) -> None:
        with self._lock:
            self._live.add(opened)

    def _require_same_space(self, opened: OpenDatabase, model: OpenModel) -> None:
        if not opened.database.encoder.same_space(model.pipeline.identity):
            raise EncoderMismatchError(
                f"database {opened.name} was made by {opened.database.encoder.name}, but the model {model.name} needs "
                f"{model.pipeline.identity.name}; rebuild one of them"
            )

    def _timed(self, name: str, kind: str, open_version: Callable[[], Opened], *, is_problem: bool = True) -> Opened:
        """Open a version, and record the outcome in the metrics, the log and, if ``is_problem``, the problems."""
        started = time.monotonic()
        try:
            with expected_errors():
                opened = open_version()
        except (KNNDiffusionError, ModelError) as error:
            self._metrics.swaps.labels(kind=kind, outcome="failed").inc()
            if is_problem:
                self.problems[name] = f"the new version of {name} does not open: {public_message(error)}"
            logs.get("serve").warning("the new version of %s does not open, the old one remains: %s", name, error)
            if isinstance(error, InputError | ModelError):  # the version is at fault, and not the request for it
                raise StageError(str(error)) from error
            raise
        self.problems.pop(name, None)
        self._metrics.swap_seconds.labels(kind=kind).observe(time.monotonic() - started)
        self._metrics.swaps.labels(kind=kind, outcome="done").inc()
        self._metrics.last_swap.labels(kind=kind).set(time.time())
        logs.get("serve").info("%s: version %s is served", name, opened.version)
        return opened

    def _served(self, name: str, entry: Entry | None, listing: Listing) -> ServedDatabase:
        registered = listing.databases.get(name, [])
        aliases = {alias: int(one["version"]) for one in registered for alias in one["aliases"]}
        shown = aliases.get(CHAMPION) if entry is None else entry.opened.version
        tags = next((one for one in registered if one["version"] == shown), {})
        return ServedDatabase(
            name=name,
            served=None if entry is None else entry.opened.info,
            champion=aliases.get(CHAMPION),
            versions=[one["version"] for one in registered],
            aliases=aliases,
            recall_at_10_image=tags.get("recall_at_10_image"),
            recall_at_10_text=tags.get("recall_at_10_text"),
            created_ms=tags.get("created_ms"),
            problem=self.problems.get(name),
        )

    def _show_serving(self) -> None:
        opened = [entry.opened for entry in self._entries.values()]
        self._metrics.set_serving([(self._model.name, one.name, len(one.database)) for one in opened])
