"""The training script of the bundled encoder and its retrieval figures, run on a few drawn images."""

import importlib
import io
import json
import logging
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.scripts import load_script
from support.tiny_domain import COLOURS, SHAPES, drawn

from model.encoder.clip import Encoder

FOLDER = Path(__file__).parents[3] / "model" / "pretrained" / "sticker-clip"
Run = Callable[..., None]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(FOLDER / "train.py")


def part(name: str) -> Any:
    """Import a module of the folder beside the script."""
    return importlib.import_module(f"clip_recipe.{name}")


def write_style(folder: Path, style: str, colours: tuple[str, ...]) -> None:
    rows = []
    for colour in colours:
        for shape in SHAPES:
            drawn(colour, shape, 128).save(webp := io.BytesIO(), "WEBP", lossless=True)
            name = f"{colour} {shape}"
            rows.append({"key": f"{style}/{name}", "style": style, "captions": [name, shape], "webp": webp.getvalue()})
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{style}.parquet")


@pytest.fixture(scope="module")
def stickers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stickers")
    for style, colours in (
        ("one", COLOURS),
        ("two", COLOURS[2:4]),
        ("emojione", COLOURS[:2]),
        ("twemoji", COLOURS[:1]),
    ):
        write_style(folder, style, colours)
    return folder


def embed_by_words(texts: list[str], teacher: Path, device: str) -> torch.Tensor:
    """Embed texts as a teacher does, by the numbers of their characters."""
    counts = torch.tensor([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz "] for text in texts])
    return torch.nn.functional.normalize(counts.float() + 0.1, dim=1)


@pytest.fixture
def run(script: ModuleType, stickers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that trains in ``tmp_path / "out"``. A sentence encoder is not installed for the tests."""
    monkeypatch.setattr(part("data"), "embed_by_teacher", embed_by_words)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a tree\nharbour\n")

    def command(*more: str) -> None:
        paths = {"stickers": stickers, "corpus": corpus, "teacher": tmp_path, "out": tmp_path / "out"}
        words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
        arguments = ["train.py", *words, "--device", "cpu", "--batch-size", "4", *more]
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()

    return command


def test_sticker_clip_script_resumes_and_reports_retrieval_of_both_encoders(
    run: Run, script: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="stopped after 1 steps; run the same command again to resume"):
        run("--stop-after", "1e-9", "--steps", "2")
    with pytest.raises(SystemExit, match=r"settings differ from those of .*state\.pt: styles; use another --out"):
        run("--styles", "one", "--steps", "2")
    run("--steps", "2")
    assert "resumed at step 1" in caplog.text

    log = json.loads((out / "train_log.json").read_text())
    assert log["steps"] == 2
    assert log["retrieval"].keys() == {"this", "bundled"}
    for encoder in log["retrieval"].values():
        assert {"emojione", "twemoji"} <= encoder.keys() <= {"emojione", "twemoji", "concepts"}
        assert encoder["emojione"].keys() == {
            "text_to_image/R@1", "text_to_image/R@5", "image_to_text/R@1", "image_to_text/R@5", "images", "names",
        }  # fmt: skip
    new, bundled = Encoder(f"local-dir:{out}"), Encoder()
    assert new.identity.weights_digest != bundled.identity.weights_digest


def test_load_data_trains_on_no_image_or_caption_of_an_unseen_style(run: Run, stickers: Path, tmp_path: Path) -> None:
    data = part("data").load_data(
        stickers=stickers, styles=["one", "emojione"], corpus=tmp_path / "corpus.txt", teacher=tmp_path,
        device="cpu", limit=None, concepts_held_out=10**9,
    )  # fmt: skip
    assert len(data.images) == len(COLOURS) * len(SHAPES), "an unseen style is excluded even if it is named"
    assert len(data.held_out["emojione"].names) == 2 * len(SHAPES)
    assert data.held_out.keys() == {"emojione", "twemoji"}


def test_read_stickers_edition_of_an_unseen_style_raises(script: ModuleType, tmp_path: Path) -> None:
    write_style(tmp_path, "svgmoji-twemoji", COLOURS[:1])
    with pytest.raises(ValueError, match=r"editions of unseen ones: svgmoji-twemoji; remove their files"):
        part("data").read_stickers(tmp_path, None, None)
    (tmp_path / "svgmoji-twemoji.parquet").rename(tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match=r"mine\.parquet has other styles than its name"):
        part("data").read_stickers(tmp_path, None, None)


def test_retrieval_counts_any_image_of_a_name_and_the_own_name_of_an_image(script: ModuleType) -> None:
    names = ["apple", "pear", "apple"]
    rows = torch.eye(3)[[0, 1, 2]]
    texts = {"apple": torch.tensor([0.1, 0.2, 0.9]), "pear": torch.tensor([0.9, 0.3, 0.0])}

    def embed_texts(words: list[str]) -> torch.Tensor:
        return torch.stack([texts[word] for word in words])

    found = part("retrieval").retrieval(torch.zeros(3), names, lambda images: rows, embed_texts)
    assert found["text_to_image/R@1"] == 0.5, "apple finds its second image, pear an apple"
    assert found["image_to_text/R@1"] == pytest.approx(2 / 3, abs=1e-4), "the first apple is closer to pear"
    assert (found["text_to_image/R@5"], found["image_to_text/R@5"]) == (1, 1)
    assert (found["images"], found["names"]) == (3, 2)


def test_make_corpus_writes_words_and_short_phrases_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["word"] * 13)
    files = {
        "index.noun": "  1 licence\nfire_engine n 1\n",
        "data.noun": f'  1 licence\n0 | a red truck; {long}; "hot fire"\n',
        "index.verb": "burn v 1\n",
        "data.verb": "0 | a red truck\n",
    }
    with tarfile.open(tmp_path / "wordnet.tgz", "w:gz") as archive:
        for name in (f"{kind}.{pos}" for kind in ("index", "data") for pos in ("noun", "verb", "adj", "adv")):
            content = files.get(name, "").encode()
            member = tarfile.TarInfo(f"package/dict/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    out = tmp_path / "corpus.txt"
    words = ["make_corpus.py", "--wordnet", str(tmp_path / "wordnet.tgz"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    load_script(FOLDER / "make_corpus.py").main()
    assert out.read_text().splitlines() == ["fire engine", "burn", "a red truck", "hot fire"]
    assert capsys.readouterr().out == "4 lines\n"
