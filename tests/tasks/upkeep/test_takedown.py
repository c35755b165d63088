"""What a takedown list names, what it is refused for, and the rows it hides."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_artifacts import IMAGES, embedding_shards, image_shards, sha, urls_of

from infra import artifacts
from infra.errors import InputError
from tasks.references.types import ImageShards
from tasks.upkeep.takedown import match_rows, read_entries, read_takedown_list, take_down


def listed(folder: Path, *rows: dict[str, Any], name: str = "down.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def three_shards(folder: Path) -> ImageShards:
    """Five pictures and a URL that failed."""
    return image_shards(folder, [[*IMAGES[:2], ("http://host/gone.png", None)], IMAGES[2:3], IMAGES[3:5]])


def test_rows_are_named_by_url_digest_and_key(tmp_path: Path) -> None:
    images = three_shards(tmp_path)
    embeddings = embedding_shards(tmp_path, images)
    by = [{"url": IMAGES[1][0]}, {"sha256": sha(IMAGES[2][1]).upper()}, {"key": "000020001"}]
    taken = take_down(listed(tmp_path, *by), images, str(tmp_path), cache=tmp_path).reference
    named = match_rows(taken, embeddings, tmp_path)
    assert named.tolist() == [1, 2, 4]
    assert [urls_of(embeddings)[row] for row in named] == [IMAGES[n][0] for n in (1, 2, 4)]


def test_lists_add_up_and_the_same_list_makes_nothing(tmp_path: Path) -> None:
    images = three_shards(tmp_path)
    first = take_down(listed(tmp_path, {"url": IMAGES[0][0]}), images, str(tmp_path), cache=tmp_path)
    both = take_down(
        listed(tmp_path, {"url": IMAGES[4][0]}), images, str(tmp_path), cache=tmp_path, previous=first.reference
    )
    assert read_entries(both.reference, tmp_path).url == {IMAGES[0][0], IMAGES[4][0]}
    again = take_down(
        listed(tmp_path, {"url": IMAGES[0][0]}), images, str(tmp_path), cache=tmp_path, previous=both.reference
    )
    assert (again.skipped, again.reference) == (True, both.reference)
    assert match_rows(both.reference, embedding_shards(tmp_path, images), tmp_path).tolist() == [0, 4]


def test_a_list_that_was_taken_down_before_is_told_without_a_look_at_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = three_shards(tmp_path)
    read: list[str] = []
    fetch = artifacts.fetch_shard

    def fetched(uri: str, *arguments: Any) -> Path:
        read.append(uri)
        return fetch(uri, *arguments)

    monkeypatch.setattr(artifacts, "fetch_shard", fetched)
    same = listed(tmp_path, {"url": IMAGES[0][0]}, {"sha256": sha(IMAGES[2][1])}, {"url": "http://host/none.png"})
    first = take_down(same, images, str(tmp_path), cache=tmp_path).reference
    assert images.uri in read
    read.clear()
    again = take_down(same, images, str(tmp_path), cache=tmp_path, previous=first)
    assert (again.skipped, again.reference) == (True, first)
    assert images.uri not in read
    by_key = listed(tmp_path, {"key": "000000001"}, name="key.jsonl")
    more = take_down(by_key, images, str(tmp_path), cache=tmp_path, previous=first).reference
    assert read_entries(more, tmp_path).sha256 >= {sha(IMAGES[1][1])}


def test_a_list_naming_nothing_is_refused_unless_it_was_taken_down_before(tmp_path: Path) -> None:
    images = three_shards(tmp_path)
    wrong = [{"url": f"http://host/none-{n}.png"} for n in range(4)] + [{"url": "http://host/gone.png"}]
    with pytest.raises(InputError, match=r"naming nothing in 5 of 5 entries \(url http://host/gone.png, url .*, …\)"):
        take_down(listed(tmp_path, *wrong), images, str(tmp_path), cache=tmp_path)
    first = take_down(listed(tmp_path, {"url": IMAGES[0][0]}), images, str(tmp_path), cache=tmp_path).reference
    others = image_shards(tmp_path / "others", [IMAGES[5:7]])  # as after a split: the picture is not there any more
    asked = listed(tmp_path, {"url": IMAGES[0][0]})
    with pytest.raises(InputError, match="naming nothing in 1 of 1 entries"):
        take_down(asked, others, str(tmp_path), cache=tmp_path)
    again = take_down(asked, others, str(tmp_path), cache=tmp_path, previous=first)
    assert (again.skipped, again.reference) == (True, first)


def test_an_entry_that_names_no_image_keeps_none_of_the_others_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, absent = three_shards(tmp_path), "http://host/none.png"
    rows = [{"url": IMAGES[0][0]}, {"url": absent}, {"url": "http://host/gone.png"}, {"key": "000099999"}]
    with caplog.at_level("WARNING"):
        taken = take_down(listed(tmp_path, *rows), images, str(tmp_path), cache=tmp_path).reference
    assert (
        "names no picture" in caplog.text and f"3 of 4 entries (url http://host/gone.png, url {absent}" in caplog.text
    )
    assert match_rows(taken, embedding_shards(tmp_path, images), tmp_path).tolist() == [0]
    kept = read_entries(taken, tmp_path)
    assert kept.url == {IMAGES[0][0], absent, "http://host/gone.png"}  # refused when they come
    assert kept.key == set()  # whose picture may be another's tomorrow


@pytest.mark.parametrize("by", ["url", "key", "sha256"])
def test_the_same_bytes_at_another_url_go_too(by: str, tmp_path: Path) -> None:
    url, body = IMAGES[0]
    images = image_shards(tmp_path, [[IMAGES[1], (url, body)], [("http://host/copy.png", body), IMAGES[2]]])
    entry = {"url": url, "key": "000000001", "sha256": sha(body)}[by]
    taken = take_down(listed(tmp_path, {by: entry}), images, str(tmp_path), cache=tmp_path).reference
    assert match_rows(taken, embedding_shards(tmp_path, images), tmp_path).tolist() == [1, 2]
    assert read_entries(taken, tmp_path).sha256 == {sha(body)}


def test_a_key_that_two_images_bear_is_refused(tmp_path: Path) -> None:
    from tasks.upkeep.merge import merged_images

    parts = [image_shards(tmp_path / name, [IMAGES[n : n + 1]]) for n, name in enumerate("ab")]
    both = merged_images(parts, str(tmp_path / "c"), cache=tmp_path).reference
    with pytest.raises(InputError, match=r"key 000000000 is borne by 2 pictures .* by its url or sha256"):
        take_down(listed(tmp_path, {"key": "000000000"}), both, str(tmp_path), cache=tmp_path)


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
def test_lists_in_every_format(name: str, text: str, expected: dict[str, set[str]], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    entries = read_takedown_list(str(tmp_path / name))
    assert {column: getattr(entries, column) for column in ("url", "sha256", "key")} == {
        "url": set(), "sha256": set(), "key": set(), **expected
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("address\nx\n", "none of the columns url, sha256 and key, only address; rename"),
        ("url,key\n,\n", "takedown list naming nothing: every entry is empty"),
        ("sha256\nabc\n", "'abc' is no sha256, which is 64 hex digits"),
    ],
)
def test_lists_that_cannot_be_used_say_why(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(InputError, match=told):
        read_takedown_list(str(tmp_path / "bad.csv"))
