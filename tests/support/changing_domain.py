"""A changing domain of synthetic images and its operations. Tests choose the workers and stores."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from support.fakes import LoopbackServer
from support.tiny_domain import COLOURS, SHAPES, drawn, encoded, write_urls

from infra import registry_database
from infra.registry import Registry
from infra.relocation import relocate
from infra.settings import Settings
from tasks.references.database import open_database
from tasks.references.types import DatabaseVersion

NAMES = [f"/{c}-{s}.png" for c in COLOURS for s in SHAPES]
BODY = {path: encoded(drawn(*path[1:-4].split("-"))) for path in NAMES}
FIRST = 12


def make_recent(folder: Path) -> None:
    """Shift the modification times below a folder, so that the newest is now: garbage collection keeps their order."""
    times = {path: path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}
    shift = time.time() - max(times.values())
    for path, modified in times.items():
        os.utime(path, (modified + shift, modified + shift))


class Living:
    """A domain of synthetic images, its server, and shortcuts for the flows.

    The flows run as plain functions unless ``on_prefect`` is True. The first build starts with a copy of
    ``migrated_database``, because MLflow's migrations take seconds.
    """

    on_prefect = False

    def __init__(
        self,
        server: LoopbackServer,
        folder: Path,
        migrated_database: Path,
        root: str | None = None,
        stored: Path | None = None,
    ) -> None:
        """Store the arguments. Databases of :meth:`start` are kept in the folder ``stored`` for later tests."""
        self.server, self.folder, self.migrated_database, self._stored = server, folder, migrated_database, stored
        self.root = folder / "data" if root is None else root
        self.settings = Settings(root=str(self.root))

    def call(self, flow: Any, config: Any) -> Any:
        """Run a flow on Prefect or as a plain function."""
        return flow(config) if self.on_prefect else flow.fn(config)

    def listed(self, *rows: Any, name: str = "urls.jsonl") -> str:
        """Write a list of URLs for paths of the server, or of entries as they are, and return its path."""
        path = self.folder / name
        if rows and isinstance(rows[0], str):
            return str(write_urls(path, [self.server.url(row) for row in rows]))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def create_registry(self) -> None:
        """Create an empty registry if there is none."""
        database = registry_database.path_of(self.settings.tracking_uri)
        if database is not None and not database.exists():
            database.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.migrated_database, database)

    def start(self, names: list[str] | dict[str, list[str]]) -> None:
        """Start with a database of these images, or with one for each domain.

        It is built once for all tests of the process, and then copied.
        """
        assert self._stored is not None
        domains = names if isinstance(names, dict) else {"shapes": names}
        kept = self._stored / hashlib.sha256(repr(domains).encode()).hexdigest()
        if kept.exists():
            shutil.copytree(kept, self.root)
            relocate(self.settings)
            make_recent(Path(self.root))
        else:
            for domain, images in domains.items():
                self.build(images, domain=domain)
            shutil.copytree(self.root, kept.with_suffix(".partial"))
            kept.with_suffix(".partial").rename(kept)
        self.server.requests.clear()

    def state(self) -> Any:
        """Return the champion of the domain and its inputs."""
        from flows.rebuild_steps import champion_of

        return champion_of("shapes", self.settings)

    def build(self, names: list[str], domain: str = "shapes", index: Any = None, urls: str | None = None) -> Any:
        from flows.new_domain import NewDomainConfig, new_domain
        from infra.download.downloader import DownloadPolicy
        from tasks.download.config import DownloadConfig
        from tasks.embed.task import EmbedConfig
        from tasks.index.config import IndexConfig

        self.create_registry()
        policy = DownloadPolicy(allow_hosts=(self.server.host,), threads=4, retries=0)
        return self.call(
            new_domain,
            NewDomainConfig(
                domain=domain,
                urls=urls or self.listed(*names, name=f"{domain}.jsonl"),
                root=str(self.root),
                download=DownloadConfig(shard_rows=4, policy=policy, workers=1),
                embed=EmbedConfig(workers=1, batch_size=4),
                index=index or IndexConfig(recall_queries=4),
            ),
        )

    def rebuild(self, **options: Any) -> Any:
        from flows.rebuild_config import RebuildIndexConfig
        from flows.rebuild_index import rebuild_index

        self.server.requests.clear()
        return self.call(rebuild_index, RebuildIndexConfig(**{"domain": "shapes", "root": str(self.root), **options}))

    def merge(self, domain: str, *databases: str, **options: Any) -> Any:
        from flows.combine_databases import MergeDatabasesConfig, merge_databases

        config = MergeDatabasesConfig(domain=domain, databases=databases, root=str(self.root), **options)
        return self.call(merge_databases, config)

    def subset(self, domain: str, database: str, where: str, **options: Any) -> Any:
        from flows.combine_databases import SubsetDatabaseConfig, subset_database

        config = SubsetDatabaseConfig(domain=domain, database=database, where=where, root=str(self.root), **options)
        return self.call(subset_database, config)

    def collect(self, **options: Any) -> Any:
        from flows.collect_garbage import CollectGarbageConfig, collect_garbage

        options = {"domain": "shapes", "root": str(self.root), "grace_s": 0, "keep_versions": 1, **options}
        return self.call(collect_garbage, CollectGarbageConfig(**options))

    def garbage_beside_what_is_refused(self) -> Path:
        """Create a domain with garbage and an unregistered domain, which fails. Return the one file of the latter."""
        self.start(NAMES[:4])
        self.rebuild(takedown=self.listed({"url": self.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
        file = Path(self.root) / "aa" / "images" / ("0" * 16) / "00000.tar"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
        return file

    def versions(self) -> list[dict[str, Any]]:
        return Registry(self.settings).versions("database")

    def found(self, database: DatabaseVersion) -> set[str]:
        """Return the paths of all rows that a search with every row finds."""
        opened = open_database(database, self.folder / "cache")
        if not len(opened):
            return set()
        rows = opened.rows(np.arange(len(opened))).astype(np.float32)
        hits = opened.search(rows / np.linalg.norm(rows, axis=1, keepdims=True), len(opened))
        ids = np.unique(hits.ids[hits.ids >= 0]).tolist()
        return {"/" + row["url"].rsplit("/", 1)[-1] for row in opened.describe(ids)}

    def champion(self, domain: str = "shapes") -> set[str]:
        """Return the paths of the visible rows of a domain's champion."""
        pulled = Registry(self.settings).pull(domain, kind="database")
        return self.found(DatabaseVersion.of(pulled.manifest, pulled.folder_uri))

    def files(self) -> dict[str, bytes]:
        """Return every file of the domain by name, except those of the lease."""
        base = Path(self.root) / "shapes"
        found = {str(path.relative_to(base)): path for path in base.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if not name.startswith("lease/")}
