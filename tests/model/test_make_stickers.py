"""make_stickers.py on small generated tarballs, without network."""

import importlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from support.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "model" / "pretrained" / "sticker-generator" / "make_stickers.py"
EMOJIS = [
    {
        "label": "raised hand",
        "hexcode": "270B",
        "tags": ["hand", "stop"],
        "skins": [{"label": "raised hand: light skin tone", "hexcode": "270B-1F3FB"}],
    },
    {"label": "flag: Bahamas", "hexcode": "1F1E7-1F1F8"},
]
RED = '<path fill="red" d="M0 0h36v36H0z"/>'


@pytest.fixture
def make() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def run(make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that runs the script for styles and returns the folder of the parquet files."""
    put(tmp_path, make.NAMES, {"en/data.json": EMOJIS})

    def command(*styles: str, side: int = 64) -> Path:
        out = tmp_path / "stickers"
        arguments = ["make_stickers.py", "--out", out, "--packages", tmp_path, "--side", side, "--styles", *styles]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        make.main()
        return out

    return command


def put(folder: Path, package: object, files: dict[str, object]) -> Path:
    """Write a tarball like that of ``npm pack``."""
    tarball: Path = folder / package.tarball  # type: ignore[attr-defined]
    with tarfile.open(tarball, "w:gz") as archive:
        for path, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return tarball


def iconify(style: str, icons: dict[str, dict[str, object]], spdx: str, **size: int) -> dict[str, object]:
    return {"icons.json": {"prefix": style, "icons": icons, **size}, "info.json": {"license": {"spdx": spdx}}}


def svg(body: str) -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="36" height="36">{body}</svg>'.encode()


def webp(width: int, height: int) -> bytes:
    image = Image.new("RGBA", (width, height))
    ImageDraw.Draw(image).rectangle((0, 0, width, height), fill="blue")
    image.save(content := io.BytesIO(), "WEBP")
    return content.getvalue()


def fluent(make: ModuleType, folder: Path) -> Path:
    files = {"package.json": {"license": "MIT"}, "assets/270b-1f3fb.webp": webp(64, 128), "assets/nothing.webp": b""}
    return put(folder, make.STYLES["fluent-3d"], files)


def test_make_stickers_fluent_images_have_captions_and_white_margins(
    make: ModuleType, run: Callable[..., Path], tmp_path: Path
) -> None:
    fluent(make, tmp_path)
    table = pq.read_table(run("fluent-3d") / "fluent-3d.parquet")
    assert table.schema.equals(make.SCHEMA)
    (row,) = table.to_pylist()
    assert (row["key"], row["style"], row["license"]) == ("fluent-3d/270b-1f3fb", "fluent-3d", "MIT")
    assert row["captions"] == ["raised hand light skin tone", "hand", "stop"]
    image = Image.open(io.BytesIO(row["webp"]))
    assert image.size == (64, 64)
    assert image.getpixel((32, 1))[2] > 200 > image.getpixel((32, 1))[0]  # as high as the sticker
    assert min(image.getpixel((8, 32))) > 245  # white margin


def test_make_stickers_iconify_icons_are_selected_and_rendered(
    make: ModuleType, run: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("resvg_py", reason="the stickers extra")
    white, hidden = {"body": RED.replace("red", "white")}, {"body": RED, "hidden": True}
    icons = {"raised-hand": {"body": RED}, "tall": {"body": RED, "height": 72}, "white": white, "old": hidden}
    put(tmp_path, make.STYLES["twemoji"], iconify("twemoji", icons, "CC-BY-4.0", width=36, height=36))
    flags = {"bs-4x3": {"body": RED}, "bs-1x1": {"body": RED}, "zz-4x3": {"body": RED}}
    put(tmp_path, make.STYLES["flag"], iconify("flag", flags, "MIT", width=36, height=27))
    numbered = {"raised-hand-2": {"body": RED}, "2": {"body": RED}}
    put(tmp_path, make.STYLES["streamline-emojis"], iconify("streamline-emojis", numbered, "CC-BY-4.0"))

    out = run("twemoji", "flag", "streamline-emojis")

    def captions(style: str) -> dict[str, list[str]]:
        return {row["key"]: row["captions"] for row in pq.read_table(out / f"{style}.parquet").to_pylist()}

    assert captions("twemoji") == {"twemoji/raised-hand": ["raised hand", "hand", "stop"], "twemoji/tall": ["tall"]}
    assert captions("flag") == {"flag/bs-4x3": ["flag of Bahamas", "Bahamas flag"]}
    assert list(captions("streamline-emojis").values()) == [["raised hand", "hand", "stop"], ["2"]]
    tall = Image.open(io.BytesIO(pq.read_table(out / "twemoji.parquet")["webp"][1].as_py()))
    assert min(tall.getpixel((8, 10))) > 245 and tall.getpixel((32, 10))[0] > 200


def test_make_stickers_filtered_set_has_coloured_square_distinct_images(
    make: ModuleType, run: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("resvg_py", reason="the stickers extra")
    half = {"body": '<path fill="blue" d="M0 0h18v36H0z"/>'}
    icons = {
        "apple-icon": half, "apple": half, "grey": {"body": RED.replace("red", "#444")},
        "wide": {"body": RED, "width": 90}, "empty": {"body": RED, "height": 0}, "tall": {"body": RED, "height": 70},
    }  # fmt: skip
    put(tmp_path, make.STYLES["logos"], iconify("logos", icons, "CC0-1.0", width=36, height=36))
    of_all = make.STYLES["gcp"]
    collection = {"prefix": "gcp", "icons": {"run": half}, "info": {"license": {"spdx": of_all.license}}, "width": 36}
    put(tmp_path, of_all, {of_all.member: {**collection, "height": 36}})
    signs = {"package_signs/regulatory--stop--g1.svg": svg(RED), "package_ui/close.svg": svg(RED)}
    put(tmp_path, make.STYLES["mapillary-signs"], {"package.json": {"license": "MIT"}, **signs})

    out = run("logos", "gcp", "mapillary-signs", side=128)

    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [(row["key"], row["captions"]) for row in rows] == [
        ("gcp/run", ["run logo"]), ("logos/apple-icon", ["apple logo"]), ("logos/tall", ["tall logo"]),
        ("mapillary-signs/regulatory--stop--g1", ["stop sign"]),
    ]  # fmt: skip
    assert {Image.open(io.BytesIO(row["webp"])).size for row in rows} == {(128, 128)}
    with pytest.raises(SystemExit, match=r"logos\.parquet has images of 128 px, not 64; use another --out"):
        run("logos", side=64)


def test_styles_are_open_pinned_and_the_unseen_ones_are_never_trained_on(make: ModuleType) -> None:
    styles = importlib.import_module("sticker_recipe.styles")
    assert len(styles.BUNDLED) == 18
    assert styles.STYLES.keys() >= styles.UNSEEN
    assert {package.license for package in styles.STYLES.values()} <= {
        "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", "MIT",
    }  # fmt: skip
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", package.version) for package in styles.STYLES.values())
    assert set(styles.training_styles(list(styles.STYLES))) == styles.STYLES.keys() - styles.UNSEEN
    for edition in ("OpenMoji-black", "emojione-v2", "emojitwo", "joypixels", "twemoji-colr"):
        with pytest.raises(ValueError, match=f"editions of unseen ones: {edition}"):
            styles.training_styles(["noto", "emojione-v1", edition])


def test_make_stickers_existing_style_is_skipped(make: ModuleType, run: Callable[..., Path], tmp_path: Path) -> None:
    tarball = fluent(make, tmp_path)
    before = (run("fluent-3d") / "fluent-3d.parquet").stat().st_mtime_ns
    tarball.write_bytes(b"not read")
    assert (run("fluent-3d") / "fluent-3d.parquet").stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "delete it"),
        (lambda _: b"<html>", "delete it"),
        (lambda _: b"", "delete it"),
    ],
    ids=["truncated", "not a tarball", "empty"],
)
def test_make_stickers_damaged_tarball_raises_with_path(
    make: ModuleType, run: Callable[..., Path], tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    tarball = fluent(make, tmp_path)
    tarball.write_bytes(damage(tarball.read_bytes()))
    with pytest.raises(SystemExit) as stopped:
        run("fluent-3d")
    assert str(tarball) in str(stopped.value) and message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not list((tmp_path / "stickers").iterdir())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b""}, "KeyError: 'package.json'"),
        ({"package.json": {"license": "MIT"}}, "no image in the package"),
        ({"package.json": {"license": "MIT"}, "assets/270b.webp": b"damaged"}, "cannot identify image"),
        ({"package.json": {"license": "GPL-3.0"}}, "has changed: GPL-3.0, not MIT"),
    ],
    ids=["another package", "no image", "damaged image", "another licence"],
)
def test_make_stickers_wrong_package_raises_with_tarball(
    make: ModuleType, run: Callable[..., Path], tmp_path: Path, files: dict[str, object], message: str
) -> None:
    tarball = put(tmp_path, make.STYLES["fluent-3d"], files)
    with pytest.raises(SystemExit, match=message) as stopped:
        run("fluent-3d")
    assert tarball.name in str(stopped.value) and "\n" not in str(stopped.value)


def test_make_stickers_out_is_a_file_raises(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "stickers").touch()
    with pytest.raises(SystemExit, match="--out and --packages must be writable folders"):
        run("fluent-3d")


def test_make_stickers_without_npm_raises(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"npm is not installed: .*fluent-emoji-3d-1\.1\.0\.tgz; install Node\.js"):
        run("fluent-3d")


def test_make_stickers_without_renderer_raises(
    make: ModuleType, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, make.STYLES["twemoji"], iconify("twemoji", {"a": {"body": RED}}, "CC-BY-4.0"))
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(SystemExit, match=r"resvg_py.* pip install 'knn-diffusion\[stickers\]'"):
        run("twemoji")


@pytest.mark.parametrize("works", [True, False])
def test_make_stickers_missing_tarball_is_downloaded_with_npm(
    make: ModuleType, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    tarball = fluent(make, served)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    body = f"cp '{tarball}' \"$4\"" if works else "echo 'npm error code E404' >&2; echo more >&2; exit 1"
    npm.write_text(f"#!/bin/sh\n{body}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    if works:
        assert (run("fluent-3d") / "fluent-3d.parquet").exists()
        assert (tmp_path / tarball.name).exists()
    else:
        with pytest.raises(SystemExit, match=r"fluent-emoji-3d@1\.1\.0 cannot be downloaded: npm error code E404; try"):
            run("fluent-3d")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
