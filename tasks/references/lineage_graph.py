"""Lineage of a registered version: generator, databases, embeddings, images, URL lists and encoders as a graph."""

import dataclasses
from collections.abc import Callable
from typing import Any

from infra import artifacts, uris
from infra.errors import KNNDiffusionError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """An artifact and what it was made from. ``relation`` is its role for the artifact above."""

    relation: str
    kind: str
    uri: str
    digest: str = ""
    rows: int | None = None
    encoder: str = ""
    sources: tuple["Node", ...] = ()


Read = Callable[[str], artifacts.Manifest]


def lineage_of(
    manifest: artifacts.Manifest, uri: str, *, relation: str = "", read: Read = artifacts.read_manifest
) -> Node:
    """Follow the inputs of a manifest. An input that cannot be read, e.g. a URL list, has no sources."""
    sources = []
    for name, source in sorted(manifest.inputs.items()):
        try:
            node = lineage_of(read(source["uri"]), source["uri"], relation=name, read=read)
        except KNNDiffusionError:
            node = Node(relation=name, kind="file", uri=uris.masked(source["uri"]), digest=source["digest"])
        sources.append(node)
    return Node(
        relation=relation,
        kind=manifest.kind,
        uri=uris.masked(uri),
        digest=manifest.digest,
        rows=manifest.rows,
        encoder=str(manifest.identity.get("encoder", {}).get("name", "")),
        sources=tuple(sources),
    )


def to_text(node: Node, depth: int = 0) -> str:
    """Return the graph as an indented list."""
    rows = "" if node.rows is None else f", {node.rows} rows"
    encoder = f", encoder {node.encoder}" if node.encoder else ""
    line = f"{'  ' * depth}{node.kind} {node.digest[:12]}{rows}{encoder}  {node.uri}"
    return "\n".join([line, *(to_text(source, depth + 1) for source in node.sources)])


def to_dict(node: Node) -> dict[str, Any]:
    """Return the graph as nested JSON-ready objects."""
    return dataclasses.asdict(node)


def to_mermaid(node: Node) -> str:
    """Return the graph as a Mermaid flowchart with one node per artifact and an arrow from each source."""
    numbers: dict[str, str] = {}
    lines: dict[str, None] = {}

    def visit(one: Node) -> str:
        name = numbers.setdefault(one.uri, f"n{len(numbers)}")
        label = f"{one.kind} {one.digest[:8]}" + (f"<br>{one.encoder}" if one.encoder else "")
        lines[f'  {name}["{label}"]'] = None
        for source in one.sources:
            lines[f"  {visit(source)} --> {name}"] = None
        return name

    visit(node)
    return "\n".join(["flowchart LR", *lines])
