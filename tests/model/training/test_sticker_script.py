"""The script that trains the embedded generator, run for real on a few drawn pictures: told to end, and run again."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from small_domain import COLOURS, SHAPES, drawn

from model.pipeline import KNNDiffusionPipeline

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "model" / "pretrained" / "sticker-generator" / "train.py"


def write_style(path: Path, colours: tuple[str, ...]) -> None:
    encoded = []
    for colour in colours:
        for shape in SHAPES:
            buffer = io.BytesIO()
            drawn(colour, shape, 32).save(buffer, "WEBP", lossless=True)
            encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"webp": encoded}), path)


def command(stickers: Path, out: Path, images: int) -> list[str]:
    size = ["--size", "16", "--width", "16", "--head", "16", "--layers", "1", "--batch", "4", "--watch", "2"]
    folders = ["--stickers", str(stickers), "--out", str(out)]
    return [sys.executable, str(SCRIPT), "base", *folders, "--images", str(images), *size]


def test_told_to_end_it_keeps_the_step_in_hand_and_goes_on_from_it(tmp_path: Path) -> None:
    stickers, out = tmp_path / "stickers", tmp_path / "out"
    stickers.mkdir()
    for name, colours in (("one", COLOURS[:2]), ("two", COLOURS[2:4]), ("openmoji", COLOURS[4:6])):
        write_style(stickers / f"{name}.parquet", colours)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    state = out / "base" / "checkpoint.pt"

    process = subprocess.Popen(command(stickers, out, 400_000), env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1, told
    step = torch.load(state, weights_only=True)["step"]
    assert f"base: stopped after {4 * step} images; run again to go on from there" in told

    again = command(stickers, out, 4 * (step + 2))
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    pipeline = KNNDiffusionPipeline.open(out / "base" / "pipeline")
    assert (pipeline.side, pipeline.transformer.config.in_channels) == (16, 6)
