"""Takedown lists: formats, validation, and the rows that they match."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_artifacts import IMAGES, embedding_shards, image_shards, sha, urls_of

from infra import artifacts
from infra.errors import InputError
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import match_rows, read_entries, read_takedown_list
from tasks.references.types import ImageShards
from tasks.upkeep.takedown import take_down


def listed(folder: Path, *rows: dict[str, Any], name: str = "down.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def three_shards(folder: Path) -> ImageShards:
    """Image shards with five images and a URL that failed."""
    return image_shards(folder, [[*IMAGES[:2], ("http://host/gone.png", None)], IMAGES[2:3], IMAGES[3:5]])


def test_match_rows_by_url_sha256_and_key(tmp_path: Path) -> None:
    images = three_shards(tmp_path)
    embeddings = embedding_shards(tmp_path, images)
    by = [{"url": IMAGES[1][0]}, {"sha256": sha(IMAGES[2][1]).upper()}, {"key": "000020001"}]
    taken = take_down(listed(tmp_path, *by), images, DomainFolder(uri=str(tmp_path), cache=tmp_path)).reference
    named = match_rows(taken, embeddings, tmp_path)
    assert named.tolist() == [1, 2, 4]
    assert [urls_of(embeddings)[row] for row in named] == [IMAGES[n][0] for n in (1, 2, 4)]


def test_take_down_lists_accumulate_and_known_list_is_skipped(tmp_path: Path) -> None:
    images = three_shards(tmp_path)
    first = take_down(listed(tmp_path, {"url": IMAGES[0][0]}), images, DomainFolder(uri=str(tmp_path), cache=tmp_path))
    both = take_down(
        listed(tmp_path, {"url": IMAGES[4][0]}),
        images,
        DomainFolder(uri=str(tmp_path), cache=tmp_path),
        previous=first.reference,
    )
    assert read_entries(both.reference, tmp_path).url == {IMAGES[0][0], IMAGES[4][0]}
    again = take_down(
        listed(tmp_path, {"url": IMAGES[0][0]}),
        images,
        DomainFolder(uri=str(tmp_path), cache=tmp_path),
        previous=both.reference,
    )
    assert (again.skipped, again.reference) == (True, both.reference)
    assert match_rows(both.reference, embedding_shards(tmp_path, images), tmp_path).tolist() == [0, 4]


def test_take_down_known_list_does_not_read_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = three_shards(tmp_path)
    read: list[str] = []
    fetch = artifacts.fetch_shard

    def fetched(uri: str, *arguments: Any) -> Path:
        read.append(uri)
        return fetch(uri, *arguments)

    monkeypatch.setattr(artifacts, "fetch_shard", fetched)
    same = listed(tmp_path, {"url": IMAGES[0][0]}, {"sha256": sha(IMAGES[2][1])}, {"url": "http://host/none.png"})
    first = take_down(same, images, DomainFolder(uri=str(tmp_path), cache=tmp_path)).reference
    assert images.uri in read
    read.clear()
    again = take_down(same, images, DomainFolder(uri=str(tmp_path), cache=tmp_path), previous=first)
    assert (again.skipped, again.reference) == (True, first)
    assert images.uri not in read
    by_key = listed(tmp_path, {"key": "000000001"}, name="key.jsonl")
    more = take_down(by_key, images, DomainFolder(uri=str(tmp_path), cache=tmp_path), previous=first).reference
    assert read_entries(more, tmp_path).sha256 >= {sha(IMAGES[1][1])}


def test_take_down_without_match_raises_unless_known(tmp_path: Path) -> None:
    images = three_shards(tmp_path)
    wrong = [{"url": f"http://host/none-{n}.png"} for n in range(4)] + [{"url": "http://host/gone.png"}]
    with pytest.raises(
        InputError, match=r"matches no image of .*: 5 of 5 entries \(url http://host/gone.png, url .*, …\)"
    ):
        take_down(listed(tmp_path, *wrong), images, DomainFolder(uri=str(tmp_path), cache=tmp_path))
    first = take_down(
        listed(tmp_path, {"url": IMAGES[0][0]}), images, DomainFolder(uri=str(tmp_path), cache=tmp_path)
    ).reference
    others = image_shards(tmp_path / "others", [IMAGES[5:7]])  # without the image, as after a subset
    same_list = listed(tmp_path, {"url": IMAGES[0][0]})
    with pytest.raises(InputError, match=r"matches no image of .*: 1 of 1 entries"):
        take_down(same_list, others, DomainFolder(uri=str(tmp_path), cache=tmp_path))
    again = take_down(same_list, others, DomainFolder(uri=str(tmp_path), cache=tmp_path), previous=first)
    assert (again.skipped, again.reference) == (True, first)


def test_take_down_with_unmatched_entry_logs_and_applies_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, absent = three_shards(tmp_path), "http://host/none.png"
    rows = [{"url": IMAGES[0][0]}, {"url": absent}, {"url": "http://host/gone.png"}, {"key": "000099999"}]
    with caplog.at_level("WARNING"):
        taken = take_down(listed(tmp_path, *rows), images, DomainFolder(uri=str(tmp_path), cache=tmp_path)).reference
    assert (
        "has entries that match no image" in caplog.text
        and f"3 of 4 entries (url http://host/gone.png, url {absent}" in caplog.text
    )
    assert match_rows(taken, embedding_shards(tmp_path, images), tmp_path).tolist() == [0]
    entries = read_entries(taken, tmp_path)
    assert entries.url == {IMAGES[0][0], absent, "http://host/gone.png"}  # so that later downloads reject them
    assert entries.key == set()  # later the key could belong to another image


@pytest.mark.parametrize("by", ["url", "key", "sha256"])
def test_take_down_matches_copies_at_other_urls(by: str, tmp_path: Path) -> None:
    url, body = IMAGES[0]
    images = image_shards(tmp_path, [[IMAGES[1], (url, body)], [("http://host/copy.png", body), IMAGES[2]]])
    entry = {"url": url, "key": "000000001", "sha256": sha(body)}[by]
    taken = take_down(listed(tmp_path, {by: entry}), images, DomainFolder(uri=str(tmp_path), cache=tmp_path)).reference
    assert match_rows(taken, embedding_shards(tmp_path, images), tmp_path).tolist() == [1, 2]
    assert read_entries(taken, tmp_path).sha256 == {sha(body)}


def test_take_down_ambiguous_key_raises(tmp_path: Path) -> None:
    from tasks.upkeep.merge import merged_images

    parts = [image_shards(tmp_path / name, [IMAGES[n : n + 1]]) for n, name in enumerate("ab")]
    both = merged_images(parts, DomainFolder(uri=str(tmp_path / "c"), cache=tmp_path)).reference
    with pytest.raises(InputError, match=r"key 000000000 of .* matches 2 images .* by its url or sha256"):
        take_down(listed(tmp_path, {"key": "000000000"}), both, DomainFolder(uri=str(tmp_path), cache=tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.txt",
            "# why\nhttp://host/1.png\n\n http://host/2.png \n",
            {"url": {"http://host/1.png", "http://host/2.png"}},
        ),
        ("a.csv", "key,note\n000000012,x\n", {"key": {"000000012"}}),
        ("a.jsonl", '{"sha256": "' + "A" * 64 + '"}\n{"url": "u"}\n', {"sha256": {"a" * 64}, "url": {"u"}}),
    ],
)
def test_read_takedown_list_accepts_all_formats(
    name: str, text: str, expected: dict[str, set[str]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    entries = read_takedown_list(str(tmp_path / name))
    assert {column: getattr(entries, column) for column in ("url", "sha256", "key")} == {
        "url": set(), "sha256": set(), "key": set(), **expected
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("address\nx\n", "none of the columns url, sha256 and key: address; rename"),
        ("url,key\n,\n", "takedown list .* has no entries; add at least one"),
        ("sha256\nabc\n", "invalid sha256: 'abc'; use 64 hex digits"),
    ],
)
def test_read_takedown_list_invalid_raises(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_takedown_list(str(tmp_path / "bad.csv"))


@pytest.mark.parametrize(
    ("stored", "listed_as"),
    [
        ("http://host/a.png", " HTTP://Host:80/%61.png#top "),
        ("HTTP://Host/%61.png#top", "http://host/a.png"),  # as an earlier release stored it
    ],
)
def test_take_down_of_a_url_matches_its_variants(stored: str, listed_as: str, tmp_path: Path) -> None:
    images = image_shards(tmp_path, [[IMAGES[1], (stored, IMAGES[0][1])], [IMAGES[2]]])
    taken = take_down(listed(tmp_path, {"url": listed_as}), images, DomainFolder(uri=str(tmp_path), cache=tmp_path))
    assert match_rows(taken.reference, embedding_shards(tmp_path, images), tmp_path).tolist() == [1]
    assert read_entries(taken.reference, tmp_path).url == {"http://host/a.png"}
