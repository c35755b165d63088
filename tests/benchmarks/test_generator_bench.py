"""Benchmark of the prompts that people write, with a fake generator and encoder."""

import importlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_models

from flows.demo.images import emoji_names

PROMPTS = 6
LABELS = ("red apple", "green apple", "pineapple", "")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("generator")
    monkeypatch.setattr(module, "BENCH", tmp_path)
    return module


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("left_out")


def no_image(row: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (row, 0, 0))


def test_prompts_name_their_own_images(left_out: Any) -> None:
    prompts = left_out.read_prompts()
    assert len({prompt.text for prompt in prompts}) == 200
    assert not any("skin" in prompt.text for prompt in prompts)
    apple = next(prompt for prompt in prompts if prompt.text == "a red apple")
    assert left_out.own_images([apple], LABELS).tolist() == [[True, True, False, False]]


def test_words_of_the_prompts_are_in_the_names_of_emoji(left_out: Any) -> None:
    names = sorted(set(emoji_names().values()))
    prompts = {prompt.text: prompt for prompt in left_out.read_prompts()}
    words = {word for prompt in prompts.values() for word in prompt.words}
    unused = [w for w in words if not any(left_out.Prompt(text="", words=(w,)).names(name) for name in names)]
    assert not unused
    for text, label in (
        ("a sad face", "sad but relieved face"),
        ("a yellow car", "oncoming taxi"),
        ("the moon", "waxing gibbous moon"),
        ("a football", "american football"),
        ("a fish", "blowfish"),
        ("a train", "locomotive"),
        ("santa", "Mrs. Claus"),
        ("a happy face", "grinning face with big eyes"),
    ):
        assert prompts[text].names(label), text
    assert not prompts["a car"].names("carrot")


def test_left_out_database_never_returns_the_own_images_of_a_prompt(left_out: Any) -> None:
    rows = tiny_models.unit_rows(30).astype(np.float32)
    own = np.zeros((2, 30), bool)
    own[0, :10] = True
    database = left_out.LeftOutDatabase("named", tiny_models.identity(), rows, no_image, rows[:2], own)
    hits = database.search(rows[:2], 20)
    assert hits.ids[0].min() == 10
    assert hits.ids[1, 0] == 1
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    assert np.array_equal(hits.embeddings, rows[hits.ids])
    assert [image.getpixel((0, 0))[0] for image in database.images([3, 7])] == [3, 7]


def test_judge_scores_the_concept_and_copies_of_what_remains(bench: Any, left_out: Any) -> None:
    texts = tiny_models.unit_rows(PROMPTS).astype(np.float32)
    rows = tiny_models.unit_rows(30, seed=1).astype(np.float32)
    own = np.zeros((PROMPTS, 30), bool)
    own[0, 0] = True
    database = left_out.LeftOutDatabase("named", tiny_models.identity(), rows, no_image, texts, own)
    judge = bench.Judge(texts=texts, numbers=np.array([0, 4, 5]), rows=rows, database=database, threshold=0.99)
    perfect = judge.scores(texts[[0, 4, 5]])
    assert (perfect["clip_score"], perfect["top1"]) == (pytest.approx(1, abs=1e-3), 1)
    swapped = judge.scores(texts[[4, 0, 5]])
    assert swapped["top1"] == pytest.approx(1 / 3)
    assert swapped["top1_low"] < swapped["top1"] < swapped["top1_high"]
    assert judge.scores(rows[[0, 1, 2]])["copy_rate"] == pytest.approx(2 / 3), "row 0 is left out"


class FakePipeline:
    """A pipeline that returns black images, and records the noise of its calls."""

    device = torch.device("cpu")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.config = dict.fromkeys(names) | {"candidates": 2, "num_inference_steps": 6}
        self.backbone = tiny_models.pipeline(None).backbone
        self.latents: list[torch.Tensor] = []

    def __call__(self, texts: torch.Tensor, latents: torch.Tensor, on_progress: Any, **options: Any) -> Any:
        self.latents.append(latents)
        on_progress(1, 1)
        return types.SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(texts))


def asked_of(bench: Any, *numbers: int, own: int = 0) -> Any:
    texts = tiny_models.unit_rows(10).astype(np.float32)[list(numbers)]
    left_out = np.arange(4) == np.full((len(numbers), 1), own)
    return bench.Asked(numbers=np.array(numbers), texts=texts, own=left_out)


def test_generated_images_are_cached_by_their_settings(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline(bench.DEFAULTS)
    source = types.SimpleNamespace(name="named", version="1")
    asked = asked_of(bench, 1, 2, 4)
    images, seconds = bench.generated(pipeline, source, asked, {"quality": "fast"})
    assert images.shape == (3, 8, 8, 3)
    assert bench.generated(pipeline, source, asked, {"quality": "fast"})[1] == seconds
    assert len(pipeline.latents) == 1
    bench.generated(pipeline, source, asked_of(bench, 1, 2, 4, own=3), {"quality": "fast"})
    assert len(pipeline.latents) == 2, "other images are left out"
    bench.generated(pipeline, source, asked, {"quality": "best"})
    monkeypatch.setattr(bench, "PRESETS", {})
    bench.generated(pipeline, source, asked, {"quality": "best"})
    assert len(pipeline.latents) == 4


def test_conditions_share_the_noise_of_each_prompt_and_candidate(bench: Any) -> None:
    pipeline = FakePipeline(bench.DEFAULTS)
    source = types.SimpleNamespace(name="named", version="1")
    for options in bench.CONDITIONS.values():
        bench.generated(pipeline, source, asked_of(bench, 1, 2, 4), options)
    noise = {
        name: latents.unflatten(0, (3, -1)) for name, latents in zip(bench.CONDITIONS, pipeline.latents, strict=True)
    }
    counts = {name: latents.shape[1] for name, latents in noise.items()}
    assert counts == {"noise": 2, "noise_both": 3, "fast_one": 1, "fast": 3, "best": 8}
    for latents in noise.values():
        assert torch.equal(latents, noise["best"][:, : latents.shape[1]])
    bench.generated(pipeline, source, asked_of(bench, 4), {"quality": "best"})
    assert torch.equal(pipeline.latents[-1], noise["best"][2])


def test_choose_separates_the_prompts_that_chose_the_presets(bench: Any) -> None:
    held_out = bench.choose("held-out", 200, 160)
    assert len(held_out) == 160
    assert bench.choose("tuning", 200, 160).tolist() == list(range(0, 200, 5))
    assert not set(held_out) & set(range(0, 200, 5))
    assert bench.choose("all", 200, 1_000).tolist() == list(range(200))
    few = bench.choose("held-out", 200, 60)
    assert len(set(few)) == 60
    assert set(few) < set(held_out)
    with pytest.raises(SystemExit, match="PROMPTS is unknown: some; use one of held-out"):
        bench.choose("some", 200, 4)
