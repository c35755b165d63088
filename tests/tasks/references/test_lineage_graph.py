"""Tests of the lineage of an artifact as text and as a graph."""

from infra.artifacts import Manifest
from infra.errors import NotFoundError
from tasks.references.lineage_graph import lineage_of, to_mermaid, to_text


def manifest(kind: str, **inputs: str) -> Manifest:
    sources = {name: {"uri": uri, "digest": "d" * 64} for name, uri in inputs.items()}
    return Manifest(
        kind=kind, key="k", rows=0, shards=(), inputs=sources, config={}, identity={}, info={}, digest=kind[0] * 64
    )


STORED = {
    "/embeddings": manifest("embeddings", images="/images"),
    "/images": manifest("images", urls="/urls.csv"),
    "/database": manifest("database", embeddings="/embeddings"),
}


def read(uri: str) -> Manifest:
    if uri not in STORED:
        raise NotFoundError(f"{uri} does not exist")
    return STORED[uri]


def test_lineage_of_a_generator_ends_at_the_url_list() -> None:
    node = lineage_of(manifest("generator", database="/database", embeddings="/embeddings"), "/generator", read=read)
    lines = to_text(node).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("generator", "database", "embeddings", "images", "file", "embeddings", "images", "file")
    ]
    assert lines[4].endswith("/urls.csv")


def test_mermaid_graph_draws_a_shared_source_once() -> None:
    node = lineage_of(manifest("generator", database="/database", embeddings="/embeddings"), "/generator", read=read)
    lines = to_mermaid(node).splitlines()
    assert lines[0] == "flowchart LR"
    assert sum("-->" not in line for line in lines[1:]) == 5
    assert sum("-->" in line for line in lines) == 5
