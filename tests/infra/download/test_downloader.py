import functools
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.fakes import LoopbackServer, Reply
from support.hostile_images import large_canvas, many_scans

from infra.download.decoder import DecodeLimits, NormaliserProcess
from infra.download.downloader import DownloadPolicy, download_shard
from infra.download.limits import Limits
from infra.download.outcomes import ERROR_CLASSES, classify_outcome
from infra.download.safe_urlopen import guarded
from infra.download.shard_writer import ShardCounts
from infra.errors import InputError, StageError

ROOT = Path(__file__).parents[3]


def make_image(seed: int, size: tuple[int, int] = (32, 24), form: str = "PNG", **options: Any) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form, **options)
    return buffer.getvalue()


def policy(server: LoopbackServer, **changes: Any) -> DownloadPolicy:
    return DownloadPolicy(
        **{"allow_hosts": (server.host,), "deadline_s": 5.0, "timeout_s": 2.0, "retries": 0, "threads": 8, **changes}
    )


def urls(server: LoopbackServer, *paths: str) -> pa.Table:
    return pa.table({"url": [server.url(path) for path in paths]})


def table_of(folder: Path, shard: str = "00000") -> pa.Table:
    return pq.read_table(folder / f"{shard}.parquet")


def members_of(folder: Path, shard: str = "00000") -> dict[str, bytes]:
    with tarfile.open(folder / f"{shard}.tar") as tar:
        assert all((member.mtime, member.uid, member.gid) == (0, 0, 0) for member in tar)
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_download_shard_writes_img2dataset_layout(tmp_path: Path) -> None:
    original = make_image(1, (60, 30), "JPEG")
    with LoopbackServer({"/a.jpg": Reply(body=original)}) as server:
        rows = urls(server, "/a.jpg", "/gone.jpg")
        counts = download_shard(7, rows, tmp_path / "out", policy(server, max_side_px=40))
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["00007.parquet", "00007.tar", "00007_stats.json"]
    table = table_of(folder, "00007")
    columns = "url key status error_message width height original_width original_height sha256 error_class "
    columns += "etag last_modified"
    assert table.column_names == columns.split()
    assert [str(table.schema.field(name).type) for name in ("width", "error_class")] == ["int32", "string"]
    success, missing = table.to_pylist()
    assert success == {
        "url": rows["url"][0].as_py(),
        "key": "000070000",
        "status": "success",
        "error_message": None,
        "width": 40,
        "height": 20,
        "original_width": 60,
        "original_height": 30,
        "sha256": hashlib.sha256(original).hexdigest(),
        "error_class": "success",
        "etag": None,
        "last_modified": None,
    }
    assert (missing["key"], missing["status"], missing["error_class"]) == (
        "000070001",
        "failed_to_download",
        "http_404",
    )
    assert missing["error_message"] == "HTTP Error 404: Not Found"
    members = members_of(folder, "00007")
    assert list(members) == ["000070000.json", "000070000.png"]
    assert json.loads(members["000070000.json"]).items() <= success.items()
    assert Image.open(io.BytesIO(members["000070000.png"])).size == (40, 20)
    stats = json.loads((folder / "00007_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (2, 1, 1)
    assert counts == ShardCounts(
        requested=2, downloaded=1, outcomes={"http_404": 1, "success": 1}, seconds=counts.seconds
    )
    assert counts.seconds > 0


def test_download_shard_keeps_captions_and_other_columns(tmp_path: Path) -> None:
    with LoopbackServer({f"/{index}": Reply(body=make_image(index)) for index in range(3)}) as server:
        rows = urls(server, "/0", "/1", "/2").append_column("caption", pa.array(["a cat", None, "übung"]))
        rows = rows.append_column("when", pa.array([1, 2, None], pa.timestamp("ns")))
        rows = rows.append_column("tags", pa.array([["x"], [], None], pa.list_(pa.string())))
        download_shard(0, rows, tmp_path, policy(server))
    assert table_of(tmp_path).select(rows.column_names).equals(rows)
    members = members_of(tmp_path)
    assert [members[f"00000000{index}.txt"].decode() for index in range(3)] == ["a cat", "", "übung"]
    assert json.loads(members["000000002.json"])["caption"] == "übung"
    assert [name for name in members if name.startswith("000000000")] == [
        f"000000000.{end}" for end in ("json", "png", "txt")
    ]


def test_download_shard_without_rows_writes_empty_files(tmp_path: Path) -> None:
    with LoopbackServer({}) as server:
        counts = download_shard(0, pa.table({"url": pa.array([], pa.string())}), tmp_path, policy(server))
    assert (counts.requested, counts.downloaded, counts.outcomes) == (0, 0, {})
    assert table_of(tmp_path).num_rows == 0
    assert members_of(tmp_path) == {}


def slow(data: bytes, seconds: float) -> Callable[[], Iterator[bytes]]:
    def body() -> Iterator[bytes]:
        time.sleep(seconds)
        yield data

    return body


def test_download_shard_bytes_are_independent_of_response_order(tmp_path: Path) -> None:
    images = {f"/{index}": make_image(index) for index in range(12)}
    files: list[list[bytes]] = []
    with LoopbackServer({}) as server:
        rows = urls(server, *images, "/gone", "/text").append_column("caption", pa.array(["words"] * 14))
        for run, order in enumerate((list(images), list(reversed(images)))):
            delays = {path: 0.03 * entry for entry, path in enumerate(order)}
            server.replies = {path: Reply(body=slow(data, delays[path])) for path, data in images.items()}
            server.replies["/text"] = Reply(body=b"text")
            folder = tmp_path / str(run)
            download_shard(3, rows, folder, policy(server, threads=14))
            files.append([(folder / name).read_bytes() for name in ("00003.tar", "00003.parquet")])
    assert files[0] == files[1]
    keys = table_of(tmp_path / "0", "00003")["key"].to_pylist()
    assert keys == [f"00003{index:04d}" for index in range(14)]
    assert [name[:9] for name in members_of(tmp_path / "0", "00003")] == [key for key in keys[:12] for _ in range(3)]


def drip() -> Iterator[bytes]:
    for _ in range(100):
        time.sleep(0.05)
        yield b"x"


def hold() -> Iterator[bytes]:
    time.sleep(3)
    yield b"HTTP/1.1 200 OK\r\n\r\n"


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (32, 24)), Image.new("RGB", (32, 24), "white")]}
HUGE = bytearray(make_image(0))
HUGE[16:24] = (8_000).to_bytes(4, "big") * 2  # width and height
HUGE[29:33] = zlib.crc32(HUGE[12:29]).to_bytes(4, "big")
REPLIES: dict[str, Reply | list[Reply]] = {
    "success": Reply(body=make_image(1)),
    "http_404": Reply(status=404),
    "http_500": Reply(status=500),
    "body_too_large": Reply(body=lambda: repeat(b"x" * 4096)),
    "empty_body": Reply(),
    "robots_disallowed": Reply(body=make_image(2), headers={"X-Robots-Tag": "noai, nofollow"}),
    "blocked_address": Reply.redirect("http://10.0.0.1/x.png"),
    "blocked_scheme": Reply.redirect("file:///etc/hostname"),
    "too_many_redirects": Reply.redirect("/too_many_redirects"),
    "invalid_url": Reply.redirect("http://user:word@example.org/"),
    "connection_error": Reply(body=b"", raw=True),
    "deadline_exceeded": Reply(body=drip),
    "timeout": Reply(body=hold, raw=True),
    "not_an_image": Reply(body=b"<html>soon to come</html>"),
    "unsupported_format": Reply(body=b"8BPS\0\1" + bytes(40)),
    "decode_error": Reply(body=make_image(3)[:1000]),
    "too_small": Reply(body=make_image(4, (1, 1), "GIF")),
    "too_many_pixels": Reply(body=bytes(HUGE)),
    "too_many_scans": Reply(body=many_scans(101)),
    "animated": Reply(body=make_image(5, form="GIF", **FRAMES)),
    "decode_timeout": Reply(body=many_scans(100, side=7000)),
    "decode_memory": Reply(body=large_canvas("PNG", 7000)),
}


def resolve(host: str, *arguments: Any, **options: Any) -> Any:
    """Resolve without a name server: ``.example`` names do not exist."""
    if host.endswith(".example"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return socket.getaddrinfo(host, *arguments, **options)


def test_download_shard_every_failure_has_its_error_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.download.downloader.guarded", functools.partial(guarded, resolve=resolve))
    others = {f"/{index}": Reply(body=make_image(100 + index)) for index in range(30)}
    with LoopbackServer({**{f"/{name}": reply for name, reply in REPLIES.items()}, **others}) as server:
        rows = pa.concat_tables(
            [
                urls(server, *list(others)[:15], *(f"/{name}" for name in REPLIES), *list(others)[15:]),
                pa.table(
                    {"url": [None, "", "no url", "file:///etc/hostname", "http://[::1]:1/", "http://nowhere.example/"]}
                ),
            ]
        )
        bounds = {"max_body_bytes": 400_000, "deadline_s": 2.0, "timeout_s": 1.0, "max_redirects": 2}
        limits = DecodeLimits(seconds=0.7, memory_bytes=230 << 20)
        counts = download_shard(0, rows, tmp_path, policy(server, **bounds), limits)
    table = table_of(tmp_path)
    *classes, unresolved = table["error_class"].to_pylist()
    expected = ["success"] * 15 + list(REPLIES) + ["success"] * 15
    assert classes == [*expected, *["invalid_url"] * 3, "blocked_scheme", "blocked_address"]
    assert unresolved == "dns_error"
    assert set(classes) | {"dns_error", "internal_error", "decoder_died"} == ERROR_CLASSES | {"http_404", "http_500"}
    assert table["url"].to_pylist() == rows["url"].to_pylist()
    assert counts.requested == table.num_rows == sum(counts.outcomes.values())
    assert counts.downloaded == counts.outcomes["success"] == 31
    assert sum(name.endswith(".png") for name in members_of(tmp_path)) == 31
    for row in table.to_pylist():
        assert classify_outcome(row["status"], row["error_message"]) == row["error_class"]
        assert (row["sha256"] is not None) == (row["error_class"] == "success")


def test_download_shard_respect_robots_tag_false_ignores_tags(tmp_path: Path) -> None:
    replies = {
        "/general": Reply(body=make_image(1), headers={"X-Robots-Tag": "noindex"}),
        "/named": Reply(body=make_image(1), headers={"X-Robots-Tag": "img2dataset: noai"}),
        "/another": Reply(body=make_image(1), headers={"X-Robots-Tag": "somebot: noai"}),
    }
    with LoopbackServer(replies) as server:
        rows = urls(server, *replies)
        respected = download_shard(0, rows, tmp_path, policy(server)).outcomes
        ignored = download_shard(0, rows, tmp_path, policy(server, respect_robots_tag=False)).outcomes
    assert respected == {"robots_disallowed": 2, "success": 1}
    assert ignored == {"success": 3}


def test_download_shard_robots_tag_on_redirect_is_respected(tmp_path: Path) -> None:
    redirect = Reply(status=302, headers={"Location": "/image", "X-Robots-Tag": "max-image-preview:large, none"})
    with LoopbackServer({"/": redirect, "/image": Reply(body=make_image(1))}) as server:
        rows = urls(server, "/", "/image")
        assert download_shard(0, rows, tmp_path, policy(server)).outcomes == {"robots_disallowed": 1, "success": 1}
        ignored = download_shard(0, rows, tmp_path, policy(server, respect_robots_tag=False)).outcomes
        assert server.requests.count("/image") == 3, "a redirect with a forbidding tag is not followed"
    assert ignored == {"success": 2}


def test_download_shard_reads_all_repeated_robots_headers(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nX-Robots-Tag: otherbot: noindex\r\nX-Robots-Tag: noai\r\n\r\n"
    with LoopbackServer({"/": Reply(body=head + make_image(1), raw=True)}) as server:
        assert download_shard(0, urls(server, "/"), tmp_path, policy(server)).outcomes == {"robots_disallowed": 1}


def test_download_shard_killed_process_leaves_no_temporary_folder(tmp_path: Path) -> None:
    script = (
        "import os; from pathlib import Path; import pyarrow as pa; "
        "from infra.download.downloader import DownloadPolicy, download_shard; "
        "none = pa.table({'url': pa.array([], pa.string())}); "
        f"download_shard(0, none, Path({str(tmp_path / 'out')!r}), DownloadPolicy()); os._exit(0)"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)})
    assert (tmp_path / "out" / "00000.parquet").exists()
    assert list(temporary.iterdir()) == []


def test_download_shard_transient_failure_is_retried(tmp_path: Path) -> None:
    replies = {"/": [Reply(status=503), Reply(body=make_image(1))]}
    with LoopbackServer(replies) as server:
        assert download_shard(0, urls(server, "/"), tmp_path, policy(server, retries=1)).outcomes == {"success": 1}
    with LoopbackServer(replies) as server:
        assert download_shard(0, urls(server, "/"), tmp_path, policy(server, retries=0)).outcomes == {"http_503": 1}


def test_download_shard_row_lost_by_img2dataset_is_internal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalise, lost = NormaliserProcess.__call__, make_image(1)

    def failing(self: NormaliserProcess, stream: io.BytesIO, boxes: object = None) -> Any:
        if stream.getvalue() == lost:
            raise RuntimeError("swallowed")
        return normalise(self, stream, boxes)

    monkeypatch.setattr(NormaliserProcess, "__call__", failing)
    with LoopbackServer(
        {"/0": Reply(body=make_image(0)), "/1": Reply(body=lost), "/2": Reply(body=make_image(2))}
    ) as server:
        counts = download_shard(0, urls(server, "/0", "/1", "/2"), tmp_path, policy(server))
    assert counts.outcomes == {"internal_error": 1, "success": 2}
    rows = table_of(tmp_path).to_pylist()
    assert [row["key"] for row in rows] == ["000000000", "000000001", "000000002"]
    assert (rows[1]["status"], rows[1]["error_class"]) == ("failed_to_download", "internal_error")


def test_download_shard_full_disk_raises_stage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("infra.download.downloader.tempfile.SpooledTemporaryFile", lambda *_, **__: Full())
    with (
        LoopbackServer({"/": Reply(body=make_image(1))}) as server,
        pytest.raises(StageError, match=r"no space left .* run again"),
    ):
        download_shard(0, urls(server, "/"), tmp_path, policy(server))


def test_download_shard_restores_the_previous_opener(tmp_path: Path) -> None:
    before = urllib.request._opener  # type: ignore[attr-defined]
    with LoopbackServer({}) as server:
        download_shard(0, urls(server, "/"), tmp_path, policy(server))
    assert urllib.request._opener is before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("shard_id", "rows", "fix"),
    [
        (0, pa.table({"address": ["http://a/"]}), "rename"),
        (0, pa.table({"url": [1]}), "convert it to strings"),
        (0, pa.table({"url": ["http://a/"], "width": [1], "key": ["a"]}), r"\['key', 'width'\].*rename"),
        (0, pa.table({"url": ["http://a/"] * 10_001}), "smaller shards"),
        (100_000, pa.table({"url": ["http://a/"]}), "fewer or larger shards"),
    ],
)
def test_download_shard_invalid_rows_raise_input_error(shard_id: int, rows: pa.Table, fix: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=fix):
        download_shard(shard_id, rows, tmp_path / "out", DownloadPolicy())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_hosts": "127.0.0.1:80"}, r'write \("127.0.0.1:80",\)'),
        *(
            ({"allow_hosts": (entry,)}, "is not host:port")
            for entry in ("a", "a:", ":1", "a:x", "http://a:1", "a:0", "::1:1")
        ),
        *(
            ({name: value}, name)
            for name in ("deadline_s", "timeout_s")
            for value in (0, -1.0, float("nan"), float("inf"))
        ),
        *(({name: 0}, name) for name in ("max_body_bytes", "max_pixels", "min_side_px", "max_side_px", "threads")),
        *(({name: -1}, name) for name in ("max_redirects", "retries", "host_rate", "max_pause_s")),
        ({"max_pixels": 200_000_000}, "Pillow"),
        ({"max_side_px": 4}, "min_side_px"),
    ],
)
def test_download_policy_invalid_values_raise_value_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DownloadPolicy(**changes)


def test_download_policy_valid_values_give_limits() -> None:
    allowed = ("127.0.0.1:8123", "[::1]:80", "Images.example:443")
    bounds = {"max_body_bytes": 1, "deadline_s": 2.0, "timeout_s": 3.0, "max_redirects": 4}
    lower_case = ("127.0.0.1:8123", "[::1]:80", "images.example:443")
    assert DownloadPolicy(allow_hosts=allowed, **bounds).limits() == Limits(allow_hosts=lower_case, **bounds)


@pytest.mark.parametrize(
    ("message", "error_class"),
    [
        ("blocked_address: 10.0.0.1 (from evil.example) is not public", "blocked_address"),
        ("http_404: gone", "http_404"),
        ("HTTP Error 410: Gone", "http_410"),
        (
            "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.",
            "too_many_redirects",
        ),
        ("Use of image disallowed by X-Robots-Tag directive", "robots_disallowed"),
        ("<urlopen error [Errno -2] Name or service not known>", "dns_error"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns_error"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno 111] Connection refused>", "connection_error"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "connection_error"),
        ("Remote end closed connection without response", "connection_error"),
        ("IncompleteRead(5 bytes read, 4 more expected)", "connection_error"),
        ("<urlopen error unknown url type: gopher>", "blocked_scheme"),
        ("unknown url type: 'image.png'", "invalid_url"),
        ("<urlopen error no host given>", "invalid_url"),
        ("nonnumeric port: 'x'", "invalid_url"),
        ("'ascii' codec can't encode character", "invalid_url"),
        ("Image decoding error", "decode_error"),
        ("something new: entirely", "internal_error"),
        ("", "internal_error"),
        (None, "internal_error"),
    ],
)
def test_classify_outcome_maps_messages_to_error_classes(message: str | None, error_class: str) -> None:
    assert classify_outcome("failed_to_download", message) == error_class
    assert classify_outcome("success", message) == "success"
