"""The training script of the bundled generator, run on a few rendered images.

Tests interrupt and resume it, and train the discrete generator after its autoencoder.
"""

import importlib
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_models
from support.scripts import load_script
from support.tiny_domain import COLOURS, SHAPES, drawn

from model.pipeline import KNNDiffusionPipeline

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "model" / "pretrained" / "sticker-generator" / "train.py"


class Done(NamedTuple):
    """Exit code of a command, and what it wrote to standard error."""

    returncode: int
    output: str


Run = Callable[..., Done]


def write_style(path: Path, colours: tuple[str, ...]) -> None:
    encoded = []
    for colour in colours:
        for shape in SHAPES:
            buffer = io.BytesIO()
            drawn(colour, shape, 32).save(buffer, "WEBP", lossless=True)
            encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"webp": encoded}), path)


def command(name: str, stickers: Path, out: Path, images: int) -> list[str]:
    size = ["--size", "16", "--width", "16", "--head", "16", "--layers", "1", "--batch", "4", "--watch", "2"]
    folders = ["--stickers", str(stickers), "--out", str(out)]
    return [sys.executable, str(SCRIPT), name, *folders, "--images", str(images), "--channels", "8", "8", "8", *size]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    """Return a function that runs a command in this process, and returns its exit message, or its log if it ends well.

    The command replaces the handler of SIGTERM, which the fixture restores. Until then the signal has no effect.
    """
    caplog.set_level(logging.INFO)
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def command(*words: str) -> Done:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", list(words[1:]))
        try:
            script.main()
        except SystemExit as end:
            return Done(1, str(end.code))
        return Done(0, caplog.text)

    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def stickers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stickers")
    for name, colours in (("one", COLOURS[:2]), ("two", COLOURS[2:4]), ("openmoji", COLOURS[4:6])):
        write_style(folder / f"{name}.parquet", colours)
    return folder


def test_nearest_leaves_out_the_row_and_its_exact_copies(script: ModuleType) -> None:
    data = importlib.import_module("sticker_recipe.data")  # beside the script
    rows = tiny_models.unit_rows(8)
    rows[5] = rows[2]
    near = data.nearest(rows, 3, "cpu")
    for row in range(8):
        copies = {row} | ({2, 5} if row in (2, 5) else set())
        assert not copies & set(near[row].tolist())
    scores = (rows.astype("float32") @ rows[0].astype("float32"))[1:]
    assert rows[near[0]].astype("float32") @ rows[0].astype("float32") == pytest.approx(sorted(scores)[::-1][:3])


def test_sticker_script_sigterm_saves_a_checkpoint_and_resumes(stickers: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = out / "base" / "checkpoint.pt"

    def terminate() -> None:
        """Send SIGTERM to this process, whose handler is then that of the command, after the first checkpoint."""
        deadline = time.monotonic() + 120
        while not state.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        terminated = pool.submit(terminate)
        stopped = run(*command("base", stickers, out, 400_000))
        terminated.result()
    step = torch.load(state, weights_only=True)["step"]
    assert stopped == Done(1, f"base: stopped after {4 * step} images; run again to resume")

    other = run(*command("base", stickers, out, 400_000), "--rate", "0.1")
    assert other.returncode == 1
    assert (
        f"settings differ from those of the run in {out / 'base'}: rate 0.0015, now 0.1; use another --out"
        in other.output
    )

    done = run(*command("base", stickers, out, 4 * (step + 2)))
    assert done.returncode == 0, done.output[-2000:]
    pipeline = KNNDiffusionPipeline.open(out / "base" / "pipeline")
    assert (pipeline.side, pipeline.transformer.config.in_channels) == (16, 6)


def test_sticker_script_minutes_saves_the_weights_so_far_and_adds_up(stickers: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = []
    for _ in range(2):
        done = run(*command("base", stickers, out, 400_000), "--minutes", "1e-9")
        assert done.returncode == 0, done.output[-2000:]
        assert "--minutes 1e-09: stopped after" in done.output
        steps.append(torch.load(out / "base" / "checkpoint.pt", weights_only=True)["step"])
        pipeline = KNNDiffusionPipeline.open(out / "base" / "pipeline")
        assert pipeline.side == 16
        assert (out / "base" / f"samples-{4 * steps[-1]:09d}.png").exists()
    assert steps == [1, 2]


def test_sticker_script_discrete_generator_trains_on_the_codes_of_its_autoencoder(
    stickers: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    codes, discrete = (run(*command(name, stickers, out, 16)) for name in ("codes", "discrete"))
    assert codes.returncode == 0, codes.output[-2000:]
    assert " codes used, PSNR " in codes.output
    assert discrete.returncode == 0, discrete.output[-2000:]
    pipeline = KNNDiffusionPipeline.open(out / "discrete" / "pipeline")
    assert (pipeline.side, pipeline.transformer.config.tokens) == (16, 16)
    assert len(list((out / "discrete").glob("samples-*.png"))) == 2
    assert len(list(out.glob("data-*.npz"))) == 1, "the data are prepared once"
    assert run(*command("codes", stickers, out, 24)).returncode == 0, "a longer run resumes"
    other = run(*command("discrete", stickers, out, 24))
    assert other.returncode == 1
    assert ": codes " in other.output, "its autoencoder has changed"
