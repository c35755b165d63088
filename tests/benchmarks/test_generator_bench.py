"""Benchmark of the prompts that people write, with a fake generator and encoder."""

import dataclasses
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
    monkeypatch.setattr(importlib.import_module("draws"), "BENCH", tmp_path)
    return importlib.import_module("generator")


@pytest.fixture
def draws(bench: Any) -> Any:
    return importlib.import_module("draws")


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
        ("a face in love", "smiling face with heart eyes"),
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
    numbers, pixels = np.array([0, 4, 5]), np.zeros((3, 8, 8, 3), np.uint8)
    judge = bench.Judge(texts=texts, numbers=numbers, rows=rows, database=database, threshold=0.99)
    perfect = judge.scores(texts[[0, 4, 5]], pixels)
    assert (perfect["clip_score"], perfect["top1"]) == (pytest.approx(1, abs=1e-3), 1)
    assert "judge_top1" not in perfect
    swapped = judge.scores(texts[[4, 0, 5]], pixels)
    assert swapped["top1"] == pytest.approx(1 / 3)
    assert swapped["top1_low"] < swapped["top1"] < swapped["top1_high"]
    assert judge.scores(rows[[0, 1, 2]], pixels)["copy_rate"] == pytest.approx(2 / 3), "row 0 is left out"
    second = types.SimpleNamespace(ranks=lambda pixels, numbers: numbers)
    scores = dataclasses.replace(judge, concepts=second).scores(texts[[0, 4, 5]], pixels)
    assert (scores["judge_top1"], scores["judge_top5"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


@pytest.fixture
def several(bench: Any) -> Any:
    return importlib.import_module("several_databases")


def test_judged_divides_the_concepts_of_all_databases_by_those_of_noise(several: Any) -> None:
    first, second = np.arange(4), np.arange(2)
    ranks = {
        "one": {"noise": (first, np.array([0, 9, 9, 9])), "fast": (first, np.array([0, 0, 3, 9]))},
        "other": {"noise": (second, np.array([0, 7])), "fast": (second, np.array([0, 5])), "best": (second, second)},
    }
    judged = several.judged(ranks)
    assert set(judged) == {"noise", "fast"}, "conditions of every database"
    assert (judged["fast"]["images"], judged["fast"]["top1"], judged["fast"]["top5"]) == (6, 3, 4)
    assert (judged["fast"]["top1_ratio"][0], judged["fast"]["top5_ratio"][0]) == (1.5, 2)
    assert judged["noise"]["top1_ratio"][0] == 1
    ratio, low, high = judged["fast"]["top5_ratio"]
    assert low < ratio < high
    assert several.judged({}) == {}


def test_swaps_cover_all_of_the_distance_for_real_images(several: Any) -> None:
    rows = {"one": tiny_models.unit_rows(200), "other": tiny_models.unit_rows(200, seed=1) + np.eye(8)[0]}
    rows = {name: tiny_models.unit(each.astype(np.float32)) for name, each in rows.items()}
    real = several.swaps({name: each[:100] for name, each in rows.items()}, rows)
    assert real["covered"]["one other"] == pytest.approx(1, abs=0.1)
    assert real["kid"]["one"]["one"] < real["kid"]["one"]["other"]
    stuck = several.swaps(dict.fromkeys(rows, rows["one"][:100]), rows)
    assert stuck["covered"]["one other"] == pytest.approx(0)


def test_stored_swaps_leave_the_images_out_of_their_database(several: Any) -> None:
    rows = {name: tiny_models.unit_rows(60, seed=seed) for name, seed in (("one", 0), ("other", 1))}
    stored = {"one": np.array([0, 1, -1, 3, 4]), "other": np.array([5, -1, 7, 8, 9])}
    swapped = several.stored_swaps(stored, rows)
    assert swapped["prompts"] == 3, "prompts without an image in one of the databases do not count"
    images, others = rows["one"][[0, 3, 4]], np.delete(rows["one"], [0, 3, 4], axis=0)
    assert swapped["kid"]["one"]["one"] == pytest.approx(several.kernel_distance(images, others))
    assert swapped["kid"]["one"]["other"] == pytest.approx(several.kernel_distance(images, rows["other"]))


def test_real_copy_rate_is_the_mean_over_prompts(bench: Any) -> None:
    asked = types.SimpleNamespace(own=np.array([[1, 1, 1, 0], [0, 0, 0, 1]], bool), numbers=np.array([0, 1]))
    found = types.SimpleNamespace(scores=np.array([[0.9], [0.9], [0.9], [0.1]]))
    database = types.SimpleNamespace(nearest=lambda rows, k, numbers: found)
    assert bench.real_copy_rate(database, np.eye(4), asked, 0.5) == 0.5


class FakePipeline:
    """A pipeline whose images show the mean of their noise, and that records its calls."""

    device = torch.device("cpu")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.config = dict.fromkeys(names) | {"candidates": 2, "num_inference_steps": 6, "neighbours": 3}
        self.backbone = tiny_models.pipeline(None).backbone
        self.calls: list[dict[str, Any]] = []

    def __call__(self, texts: torch.Tensor, latents: torch.Tensor, on_progress: Any, **options: Any) -> Any:
        self.calls.append({**options, "latents": latents})
        on_progress(1, 1)
        levels = (128 + 1000 * latents.mean((1, 2, 3))).clamp(0, 255).int().tolist()
        return types.SimpleNamespace(images=[Image.new("RGB", (8, 8), (level,) * 3) for level in levels])

    def condition(self, texts: torch.Tensor, k: int, query: str | None) -> Any:
        return types.SimpleNamespace(query=None, hits=None)


class LevelEncoder:
    """Prefers dark images, or bright ones for the first prompt of ``studio_of``."""

    def embed_pixels(self, pixels: np.ndarray) -> torch.Tensor:
        level = torch.from_numpy(pixels[:, 0, 0, 0].astype(np.float32)) / 255
        return torch.stack([level, 1 - level], dim=1)


def studio_of(bench: Any, draws: Any, *numbers: int, own: int = 0) -> Any:
    texts = np.array([[1, 0]] + [[0, 1]] * (len(numbers) - 1), np.float32)
    left_out = np.arange(4) == np.full((len(numbers), 1), own)
    return draws.Studio(
        pipeline=FakePipeline(draws.DEFAULTS),
        encoder=LevelEncoder(),
        source=types.SimpleNamespace(name="named", version="1"),
        asked=draws.Asked(numbers=np.array(numbers), texts=texts, own=left_out),
    )


def test_generated_images_are_cached_by_their_settings(bench: Any, draws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = studio_of(bench, draws, 1, 2, 4)
    images, seconds = studio.generated({"quality": "fast"})
    assert images.shape == (3, 8, 8, 3)
    assert studio.generated({"quality": "fast"})[1] == seconds
    assert len(studio.pipeline.calls) == 3
    other = studio_of(bench, draws, 1, 2, 4, own=3)
    other.generated({"quality": "fast"})
    assert len(other.pipeline.calls) == 3, "other images are left out"
    studio.generated({"quality": "best"})
    assert len(studio.pipeline.calls) == 8, "the first three candidates are those of fast"
    monkeypatch.setitem(draws.PRESETS, "best", dataclasses.replace(draws.PRESETS["best"], strength=0.5))
    studio.generated({"quality": "best"})
    assert [call["strength"] for call in studio.pipeline.calls] == [0.8] * 8 + [0.5] * 8


def test_conditions_share_the_noise_of_each_prompt_and_candidate(bench: Any, draws: Any) -> None:
    studio = studio_of(bench, draws, 1, 2, 4)
    counts = {}
    for name, options in bench.CONDITIONS.items():
        before = len(studio.pipeline.calls)
        studio.generated(options)
        counts[name] = len(studio.pipeline.calls) - before
    assert counts == {"noise": 2, "noise_both": 3, "fast_one": 1, "fast": 2, "best": 5}
    noise = [call["latents"] for call in studio.pipeline.calls]
    for first, second in ((0, 2), (1, 3), (0, 5), (1, 6), (4, 7)):
        assert torch.equal(noise[first], noise[second])
    assert not torch.equal(noise[0], noise[1])
    single = studio_of(bench, draws, 4)
    single.draw(2, {})
    assert torch.equal(single.pipeline.calls[0]["latents"], noise[4][2:])


def test_select_returns_the_candidate_nearest_to_the_target(bench: Any, draws: Any) -> None:
    studio = studio_of(bench, draws, 1, 2, 4)
    levels = np.stack([studio.draw(number, {})[0][:, 0, 0, 0] for number in range(4)])
    chosen, _ = studio.select(4, {})
    assert chosen[:, 0, 0, 0].tolist() == [levels[:, 0].max(), levels[:, 1].min(), levels[:, 2].min()]


def test_choose_separates_the_prompts_that_chose_the_presets(bench: Any) -> None:
    held_out = bench.choose("held-out", 200, 160)
    assert len(held_out) == 160
    assert bench.choose("tuning", 200, 160).tolist() == list(range(0, 200, 5))
    assert not set(held_out) & set(range(0, 200, 5))
    assert bench.choose("all", 200, 1_000).tolist() == list(range(200))
    few = bench.choose("held-out", 200, 60)
    assert len(set(few)) == 60
    assert set(few) < set(held_out)
    assert set(bench.choose("held-out", 200, 40)) < set(few)
    with pytest.raises(SystemExit, match="PROMPTS is unknown: some; use one of held-out"):
        bench.choose("some", 200, 4)
