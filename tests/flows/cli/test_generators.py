"""Tests of the commands generate and edit, in process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import refused, run
from support.tiny_domain import drawn


def test_generate_with_same_seed_writes_the_same_images(domain: Any, tmp_path: Path) -> None:
    images = []
    for name, seed, candidates in (("a.png", "5", "1"), ("b.png", "5", "1"), ("c.png", "6", "1"), ("d.png", "5", "9")):
        options = ["--seed", seed, "--steps", "2", "--candidates", candidates, "--root", str(domain.root)]
        arguments = ("red circle", "blue bar", "--database", "shapes", "--out", str(tmp_path / name))
        result = run("generate", *arguments, *options)
        assert result.exit_code == 0, result.stderr
        images.append(np.asarray(Image.open(tmp_path / name)))
    assert images[0].shape == (16, 32, 3)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()
    assert (images[0] != images[3]).any()


def test_generate_between_image_and_text_writes_interpolation(domain: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--steps", "2", "--root", str(domain.root), "--out"]
    result = run("generate", str(tmp_path / "blue.png"), "red bar", *options, str(tmp_path / "a.png"), "--between", "3")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "a.png").size == (48, 16)
    result = run("generate", "a", "b", "c", *options, str(tmp_path / "a.png"), "--between", "3")
    refused(result, "--between needs two prompts: 3 were given")


class FakePipeline:
    """A pipeline that generates black images of 4 px, and records its arguments."""

    starts_from_images = True
    has_images = True
    database = SimpleNamespace(name="shapes")

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.options: dict[str, Any] = {}
        self.model = ""

    def __call__(self, prompts: list[Any], **options: Any) -> Any:
        self.prompts, self.options = prompts, options
        options["on_progress"](1, 1)
        count = len(prompts) * options.get("num_images_per_prompt", 1)
        return SimpleNamespace(images=[Image.new("RGB", (4, 4))] * count)

    def interpolate(self, first: Any, second: Any, count: int, **options: Any) -> Any:
        return self([first] * count, **options)

    def to(self, device: str) -> None:
        self.device = device

    def edit(self, source: Image.Image, prompt: str, **options: Any) -> list[Image.Image]:
        self.prompts, self.options = [prompt], options
        return [source]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()

    def load(model: str, *_: Any, **__: Any) -> FakePipeline:
        fake.model = model
        return fake

    monkeypatch.setattr("tasks.serve.load.load_pipeline", load)
    return fake


def test_generate_treats_image_paths_as_images(pipeline: FakePipeline, tmp_path: Path) -> None:
    options = ["--database", "shapes", "--out", str(tmp_path / "a.png")]
    for name in ("photo.PNG", f"{tmp_path}/my photo.webp"):
        refused(run("generate", "red bar", name, *options), f"image does not exist: {name};")
    (tmp_path / "torn.png").write_bytes(b"not an image")
    refused(run("generate", f"{tmp_path}/torn.png", *options), f"image cannot be read: {tmp_path}/torn.png")
    assert not (tmp_path / "a.png").exists()
    for name in ("my photo.png", "my photo.bmp"):
        Image.new("RGB", (5, 5)).save(tmp_path / name)
    texts = ("a drawing of what is called red.png", "photo.txt", "is this. a text " * 20)
    result = run("generate", *texts, f"{tmp_path}/my photo.png", f"{tmp_path}/my photo.bmp", *options)
    assert result.exit_code == 0, result.stderr
    assert pipeline.prompts[:3] == [*texts]
    assert [image.size for image in pipeline.prompts[3:]] == [(5, 5), (5, 5)]


@pytest.fixture
def red_image(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return str(path)


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_default_generator_not_registered_uses_the_bundled_one(
    pipeline: FakePipeline, tmp_path: Path, red_image: str, command: str
) -> None:
    (tmp_path / "root").mkdir()
    options = ("--database", "shapes", "--out", f"{tmp_path}/out.png", "--root", f"{tmp_path}/root")
    result = run(command, red_image, *(["a"] if command == "edit" else []), *options)
    assert result.exit_code == 0, result.output
    assert pipeline.model == "sticker-generator"
    assert result.stdout == f"{tmp_path}/out.png\n"
    assert result.stderr == (
        "knn-diffusion: no generator is registered as knn-diffusion; using the bundled sticker-generator\n"
    )


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_given_generator_not_registered_is_not_replaced(
    pipeline: FakePipeline, tmp_path: Path, red_image: str, command: str
) -> None:
    (tmp_path / "root").mkdir()
    options = ("--database", "shapes", "--out", f"{tmp_path}/out.png", "--root", f"{tmp_path}/root")
    result = run(command, red_image, *(["a"] if command == "edit" else []), *options, "--model", "knn-diffusion")
    assert (result.exit_code, result.stderr, pipeline.model) == (0, "", "knn-diffusion")


@pytest.mark.parametrize(
    ("alias", "model", "message"),
    [
        ("champion", "knn-diffusion", ""),
        ("candidate", "sticker-generator", "no version of knn-diffusion is the champion"),
    ],
)
def test_default_generator_registered_is_used_if_it_is_the_champion(
    pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alias: str, model: str, message: str
) -> None:
    from infra.registry import Registry

    entry = {"name": "knn-diffusion", "version": 1, "aliases": [alias]}
    monkeypatch.setattr(Registry, "versions", lambda self, kind: [entry])
    result = run("generate", "a", "--database", "shapes", "--out", f"{tmp_path}/out.png", "--root", str(tmp_path))
    assert (result.exit_code, pipeline.model) == (0, model)
    assert message in result.stderr


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (12, 12, 1), (13, 4, 4), (255, 16, 16)])
def test_generate_arranges_few_images_in_a_row_and_many_in_a_grid(
    pipeline: FakePipeline, tmp_path: Path, count: int, columns: int, rows: int
) -> None:
    options = ["--database", "shapes", "--between", str(count), "--out", str(tmp_path / "a.webp")]
    result = run("generate", "a", "b", *options)
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "a.webp").size == (4 * columns, 4 * rows)


def test_edit_passes_the_method_to_the_pipeline(pipeline: FakePipeline, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["edit", str(tmp_path / "a.png"), "red", "--database", "shapes", "--out", str(tmp_path / "b.png")]
    for method in (None, "flow", "sdedit", "restore"):
        assert run(*command, *(() if method is None else ("--method", method))).exit_code == 0
        assert pipeline.options.get("method") == method
    assert run(*command, "--method", "paint").exit_code == 2
    refused(
        run(*command, "--method", "sdedit", "--largest-region", "1"),
        "--largest-region does not apply to --method sdedit",
    )


def test_edit_with_bundled_generator_changes_a_region(domain: Any, tmp_path: Path) -> None:
    source = drawn("blue", "circle", 64)
    source.save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--model", "sticker-generator", "--root", str(domain.root)]
    out = tmp_path / "edited.png"
    result = run("edit", str(tmp_path / "blue.png"), "red ring", *options, "--candidates", "1", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(out)
    edited = np.asarray(Image.open(out))
    assert edited.shape == (64, 64, 3)
    same = (edited == np.asarray(source)).all(-1).mean()
    assert 0.4 < same < 0.98


def test_edit_with_same_seed_writes_the_same_image(domain: Any, tmp_path: Path) -> None:
    Image.new("RGBA", (90, 70), (0, 0, 255, 200)).save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--candidates", "1", "--largest-region", "1", "--root", str(domain.root)]
    images = []
    for name, seed in (("a.png", "5"), ("b.png", "5"), ("c.png", "6")):
        out = tmp_path / name
        result = run("edit", str(tmp_path / "blue.png"), "red", *options, "--seed", seed, "--out", str(out))
        assert result.exit_code == 0, result.stderr
        images.append(np.asarray(Image.open(out)))
    assert images[0].shape == (16, 16, 3)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_edit_with_invalid_image_or_number_fails_on_one_line(domain: Any, tmp_path: Path) -> None:
    options = ["--database", "shapes", "--root", str(domain.root), "--out", str(tmp_path / "a.png")]
    refused(run("edit", f"{tmp_path}/none.png", "a", *options), f"image does not exist: {tmp_path}/none.png")
    (tmp_path / "torn.png").write_bytes(b"not an image")
    refused(run("edit", f"{tmp_path}/torn.png", "a", *options), f"image cannot be read: {tmp_path}/torn.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "fine.png")
    refused(run("edit", f"{tmp_path}/fine.png", " ", *options), "a prompt is empty")
    message = "--strength is out of range: 2.0"
    refused(run("edit", f"{tmp_path}/fine.png", "a", *options, "--strength", "2"), message)
    refused(
        run("edit", f"{tmp_path}/fine.png", "a", *options, "--largest-region", "0"),
        "--largest-region is out of range: 0.0",
    )


def test_generate_with_out_dir_writes_one_file_per_image(pipeline: FakePipeline, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    options = ["--database", "shapes", "--out-dir", str(folder), "--num-images", "2", "--query", "both"]
    result = run("generate", "a", "b", *options)
    assert result.exit_code == 0, result.output
    assert [Path(line) for line in result.stdout.splitlines()] == sorted(folder.iterdir())
    assert [path.name for path in sorted(folder.iterdir())] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert (pipeline.options["num_images_per_prompt"], pipeline.options["query"]) == (2, "both")


def test_generate_uses_the_fast_preset_by_default(pipeline: FakePipeline, tmp_path: Path) -> None:
    arguments = ("generate", "a", "b", "--database", "shapes", "--out", str(tmp_path / "a.png"))

    def used(*options: str) -> tuple[Any, ...]:
        result = run(*arguments, *options)
        assert result.exit_code == 0, result.output
        return tuple(pipeline.options[name] for name in ("quality", "start", "strength", "reference"))

    assert used() == ("fast", None, None, "none")
    assert used("--quality", "best", "--strength", "0.9") == ("best", None, 0.9, "none")
    assert used("--start", "noise", "--reference", "neighbour") == ("fast", "noise", None, "neighbour")
    message = "starting from noise, because the images of database shapes cannot be read; --start neighbour shows why"
    assert message not in run(*arguments).stderr
    pipeline.has_images = False
    assert used() == ("fast", None, None, "none"), "the pipeline chooses the start"
    assert message in run(*arguments).stderr
    assert message not in run(*arguments, "--start", "neighbour").stderr
    assert message not in run(*arguments, "--between", "3").stderr
    refused(run(*arguments, "--between", "3", "--start", "neighbour"), "--start neighbour does not apply to --between")


def test_generate_on_absent_device_fails_on_one_line(
    pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(size: int, *, device: str) -> None:
        raise RuntimeError(f"No {device} here\nand more")

    monkeypatch.setattr(torch, "empty", empty)
    options = ["--database", "shapes", "--out", str(tmp_path / "a.png"), "--model", "sticker-generator", "--device"]
    refused(run("generate", "a", *options, "cuda:7"), "--device is not available: cuda:7 (No cuda:7 here); use cpu")
    refused(run("generate", "a", *options, "tpu"), "--device is unknown: tpu; use cpu, cuda")


def test_generate_with_quiet_prints_only_the_path(pipeline: FakePipeline, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    root = ["--root", str(tmp_path)]  # nothing is registered here, which is otherwise mentioned
    result = run("generate", "a", "--database", "shapes", "--out", str(out), "--quiet", *root)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{out}\n", "")
