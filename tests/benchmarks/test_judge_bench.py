"""The independent judge of the generator benchmark: its data, its training, and the names that it compares."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220)}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("judge")
    monkeypatch.setattr(module, "BENCH", tmp_path / "bench")
    return module


@pytest.fixture
def concepts(judge: Any) -> Any:
    return importlib.import_module("concepts")


def square(colour: tuple[int, int, int]) -> bytes:
    image = Image.new("RGB", (64, 64), "white")
    image.paste(colour, (12, 12, 52, 52))
    image.save(stored := io.BytesIO(), "WEBP")
    return stored.getvalue()


def stickers(folder: Path, *names: str, style: str = "drawn") -> Path:
    folder.mkdir(exist_ok=True)
    webps = [square(next((rgb for colour, rgb in COLOURS.items() if colour in name), (90, 90, 90))) for name in names]
    captions = [[name, f"{name.split()[0]} thing"] for name in names]
    pq.write_table(pa.table({"captions": captions, "webp": webps}), folder / f"{style}.parquet")
    return folder


def test_words_of_are_singular_and_without_articles(judge: Any) -> None:
    assert judge.words_of("A bunch of Grapes, and a glass") == ("bunch", "grape", "glass")
    assert judge.words_of("the bus") == ("bus",)


def test_read_icons_leaves_out_databases_skin_tones_and_flags(judge: Any, tmp_path: Path) -> None:
    names = ("red hand", "red hand medium dark", "red hand light skin tone", "blue flag", "traffic light", "hand red")
    folder = stickers(tmp_path, *names)
    stickers(tmp_path, "green hand", style="twemoji")
    icons = judge.read_icons(judge.icon_files(folder))
    assert icons.texts == (("red hand", "red thing", "hand red", "hand thing"), ("traffic light", "traffic thing"))
    assert icons.rows == ((0, 2), (1,))
    assert icons.pixels.shape == (3, 3, 64, 64)
    with pytest.raises(SystemExit, match="the judge has no parquet file to train on"):
        judge.icon_files(tmp_path / "nowhere")


def test_trained_judge_tells_names_apart_and_is_cached(
    judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stickers(tmp_path, "red square", "green square", "blue square")
    config = judge.JudgeConfig(steps=40, batch_size=3, warmup=5, width=4, dimension=16)
    monkeypatch.setattr(judge, "augment", lambda images, rng: images)
    model = judge.trained_judge(folder, config)
    names = [f"{colour} square" for colour in COLOURS]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(square(colour)))) for colour in COLOURS.values()])
    cosines = model.embed_pixels(pixels) @ model.embed_texts(names).T
    assert cosines.argmax(1).tolist() == [0, 1, 2]
    monkeypatch.setattr(judge, "train", None)
    assert np.array_equal(judge.trained_judge(folder, config).embed_texts(names), model.embed_texts(names))


def test_augment_keeps_shape_and_range(judge: Any) -> None:
    images = torch.rand(5, 3, 64, 64)
    changed = judge.augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    assert not torch.allclose(changed, images, atol=0.05)


def test_contrastive_loss_ignores_texts_that_describe_the_image(judge: Any) -> None:
    has = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1.0]])
    numbers = torch.tensor([[1, 2], [1, 0]])
    described = judge.describes(numbers, has)
    assert described.tolist() == [[True, True], [False, True]]
    logits = torch.tensor([[1.0, 9.0], [0.0, 1.0]])
    assert judge.contrastive_loss(logits, described) < judge.contrastive_loss(logits, torch.eye(2, dtype=torch.bool))


def test_distractors_do_not_describe_the_prompt(judge: Any, concepts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = importlib.import_module("left_out")
    prompts = [
        left_out.Prompt(text="a red apple", words=("apple",)),
        left_out.Prompt(text="a sad face", words=("sad", "crying")),
    ]
    vocabulary = {word for name in concepts.judged_names() for word in judge.words_of(name)}
    model = judge.DualEncoder(vocabulary, judge.JudgeConfig(width=4, dimension=16))
    keywords = {judge.words_of("cherries"): {"fruit", "red"}, ("weary", "face"): {"sad"}}
    chosen = concepts.Concepts.of(model, prompts, keywords)
    apple, sad = ({chosen.names[number] for number in numbers} for numbers in chosen.distractors)
    assert len(apple) == len(sad) == 999
    assert not apple & {"red apple", "green apple", "red heart", "cherries"}
    assert not sad & {"sad but relieved face", "crying face", "weary face"}
    assert any("face" in name for name in sad)
    assert chosen.unknown == ()


def test_judged_names_have_no_skin_tones_and_no_countries(concepts: Any) -> None:
    names = concepts.judged_names()
    assert len(names) > 1_500
    assert not [name for name in names if "skin tone" in name]
    assert not {"France", "England", "Curaçao", "pirate flag"} & set(names)


def test_ranks_count_the_names_that_are_nearer_than_the_prompt(
    judge: Any, concepts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"a": [1, 0], "b": [0, 1], "c": [0.6, 0.8], "own": [0.8, 0.6]}

    class Fake:
        def embed_texts(self, texts: list[str]) -> np.ndarray:
            return np.array([rows[text] for text in texts], np.float32)

        def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
            return np.array([[1, 0], [0, 1]], np.float32)

    prompt = importlib.import_module("left_out").Prompt(text="own", words=())
    asked = concepts.Concepts(
        judge=Fake(), prompts=[prompt], names=("a", "b", "c"), distractors=np.array([[1, 2]]), unknown=()
    )
    assert asked.ranks(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 0])).tolist() == [0, 2]
