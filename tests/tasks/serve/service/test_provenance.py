"""Provenance in PNG files: what is stored, and hostile files and captions."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from flows.cli.app import app
from infra.errors import InputError
from tasks.serve.service.provenance import CHUNK, describe, encode_png, hit_provenance, read_provenance
from tasks.serve.service.responses import Hit

HOSTILE = 'a "cat"\x1b[31m\x00</script><script>alert(1)</script>\u202e\ud800\n'
PROVENANCE: dict[str, Any] = {
    "kind": "generate",
    "model": "knn-diffusion/3",
    "database": {"name": "birds", "version": 2},
    "seed": 7,
    "settings": {"prompt": HOSTILE, "steps": 6, "negative_prompt": None},
    "neighbours": [{"id": 4, "score": 0.5, "url": "http://a/b.png", "columns": {"licence": "CC0", "caption": HOSTILE}}],
    "nearest": {"id": 4, "score": 0.7, "url": "http://a/b.png", "columns": {}},
}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def png_with(path: Path, text: str, keyword: str = CHUNK) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(keyword, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=chunks)
    return path


def test_png_returns_its_provenance_unchanged(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", encode_png(Image.new("RGB", (8, 8), "red"), PROVENANCE))
    assert read_provenance(path) == PROVENANCE
    with Image.open(path) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
        assert image.info["seed"] == "7"
        assert image.info["neighbours"] == "http://a/b.png"
        assert "\x1b" not in image.info["prompt"]


def test_lines_have_the_values_and_no_control_characters() -> None:
    lines = describe(PROVENANCE)
    text = "\n".join(lines)
    for part in ("knn-diffusion/3", "birds", "row 4", "licence=CC0", "0.7"):
        assert part in text
    assert all(line.isprintable() for line in lines)
    assert "negative_prompt" not in text


def test_columns_of_neighbours_are_shortened() -> None:
    columns = {f"column {number}": "x" * 10_000 for number in range(100)} | {"size": 3}
    kept = hit_provenance(Hit(id=1, rank=1, score=0.12345678, columns=columns))
    assert kept["score"] == 0.1235
    assert len(json.dumps(kept)) < 20_000


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: path, "file does not exist"),
        (lambda path: written(path, b"no image"), "file is not a readable PNG"),
        (lambda path: written(path, b""), "file is not a readable PNG"),
        (lambda path: png_with(path, "x", keyword="other"), "image has no provenance"),
        (lambda path: png_with(path, "{"), "provenance is damaged"),
        (lambda path: png_with(path, "[" * 100_000), "provenance is damaged"),
        (lambda path: png_with(path, "[1]"), "provenance is not an object"),
    ],
)
def test_file_without_provenance_is_reported_on_one_line(make: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=line):
        read_provenance(make(tmp_path / "a.png"))


def test_jpeg_and_compressed_bomb_are_rejected(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="not a readable PNG"):
        read_provenance(tmp_path / "a.jpg")
    plain = encode_png(Image.new("RGB", (4, 4)), {})
    data = CHUNK.encode() + b"\0\1\0\0\0" + zlib.compress(b"x" * 100_000_000)
    chunk = struct.pack(">I", len(data)) + b"iTXt" + data + struct.pack(">I", zlib.crc32(b"iTXt" + data))
    bomb = written(tmp_path / "bomb.png", plain[:33] + chunk + plain[33:])
    with pytest.raises(InputError):
        read_provenance(bomb)


@pytest.mark.parametrize("odd", [{"neighbours": [1, None, {"columns": 3}], "settings": [], "nearest": {"id": {}}}, {}])
def test_odd_provenance_is_shown_as_json(odd: dict[str, Any]) -> None:
    assert all(isinstance(line, str) for line in describe(odd))


def test_inspect_prints_lines_or_json(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", encode_png(Image.new("RGB", (8, 8)), PROVENANCE))
    lines = CliRunner().invoke(app, ["inspect", str(path)])
    assert lines.exit_code == 0
    assert "knn-diffusion/3" in lines.output
    assert "\x1b" not in lines.output
    given = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert json.loads(given.output)["seed"] == 7
    missing = CliRunner().invoke(app, ["inspect", str(tmp_path / "b.png")])
    assert missing.exit_code == 1
    assert "file does not exist" in missing.output
