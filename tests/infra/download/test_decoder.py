import io
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.hostile_images import encoded, large_canvas, many_scans

from infra.download.decoder import DecodeLimits, ImageBounds, NormaliserProcess
from infra.download.images import ImageNormaliser, Normalised, jpeg_scans

BOUNDS = ImageBounds(max_pixels=50_000_000, min_side_px=8, max_side_px=512)
LIMITS = DecodeLimits(seconds=20.0, memory_bytes=2 << 30)


@pytest.fixture(scope="module")
def generous() -> Iterator[NormaliserProcess]:
    with NormaliserProcess(BOUNDS, LIMITS) as process:
        yield process


def noise(form: str, **options: Any) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), form, **options)


def error_class(normalised: Normalised) -> str:
    *nothing, message = normalised
    assert nothing == [None] * 5
    assert message is not None
    return message.partition(":")[0]


def pid_of(process: NormaliserProcess) -> int:
    assert process._running is not None
    return process._running[0].pid


@pytest.mark.parametrize(
    "data",
    [
        *(noise(form) for form in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")),
        noise("JPEG", progressive=True),
        noise("PNG")[:1000],
        b"",
        b"<html>",
        encoded(Image.new("RGB", (1000, 700)), "PNG"),
    ],
)
def test_normaliser_process_equals_image_normaliser_for_any_input(data: bytes, generous: NormaliserProcess) -> None:
    direct = ImageNormaliser(max_pixels=50_000_000, min_side_px=8, max_side_px=512)
    assert generous(io.BytesIO(data)) == direct(io.BytesIO(data))


def test_normaliser_process_slow_image_times_out_and_next_is_decoded() -> None:
    slow, quick = many_scans(100, side=7000), noise("PNG")
    with NormaliserProcess(BOUNDS, replace(LIMITS, seconds=0.4)) as process:
        first = pid_of(process)
        started = time.monotonic()
        assert error_class(process(io.BytesIO(slow))) == "decode_timeout"
        assert time.monotonic() - started < 1.5
        assert process(io.BytesIO(quick))[1:3] == (64, 48)
        assert pid_of(process) != first


@pytest.fixture(scope="module")
def frugal() -> Iterator[NormaliserProcess]:
    with NormaliserProcess(BOUNDS, replace(LIMITS, memory_bytes=96 << 20)) as process:
        yield process


@pytest.mark.parametrize("form", ["AVIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
def test_normaliser_process_huge_canvas_is_rejected_within_memory_limit(form: str, frugal: NormaliserProcess) -> None:
    # Some codecs report a failed allocation as corrupt data.
    expected = ("decode_memory",) if form in ("PNG", "TIFF") else ("decode_memory", "decode_error")
    assert error_class(frugal(io.BytesIO(large_canvas(form, 4000)))) in expected
    assert frugal(io.BytesIO(noise("PNG")))[1:3] == (64, 48)
    status = Path(f"/proc/{pid_of(frugal)}/status").read_text()
    peak_kib = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    assert peak_kib < 160 << 10, "96 MiB of data plus the code"


@pytest.mark.parametrize("form", ["AVIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
def test_normaliser_process_canvas_above_max_pixels_is_rejected_before_decoding(form: str) -> None:
    with NormaliserProcess(replace(BOUNDS, max_pixels=1_000_000), LIMITS) as process:
        assert error_class(process(io.BytesIO(large_canvas(form, 1001)))) == "too_many_pixels"


def test_normaliser_process_crashed_decoder_loses_one_image() -> None:
    with NormaliserProcess(BOUNDS, LIMITS) as process:
        os.kill(pid_of(process), signal.SIGSEGV)
        assert error_class(process(io.BytesIO(noise("PNG")))) == "decoder_died"
        assert process(io.BytesIO(noise("PNG")))[1:3] == (64, 48)


def test_normaliser_process_has_no_credentials_and_ends_with_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with NormaliserProcess(BOUNDS, LIMITS) as process:
        folder = Path(f"/proc/{pid_of(process)}")
        assert b"secret" not in (folder / "environ").read_bytes()
    assert not folder.exists()


def test_normaliser_process_exits_when_parent_closes_the_pipe() -> None:
    with NormaliserProcess(BOUNDS, LIMITS) as process:
        assert process._running is not None
        child, pipe = process._running
        pipe.close()
        assert child.wait(10) == 0


@pytest.mark.parametrize("changes", [{"seconds": 0}, {"seconds": float("inf")}, {"memory_bytes": 0}])
def test_decode_limits_invalid_values_raise_value_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(LIMITS, **changes)


def test_image_normaliser_jpeg_with_many_scans_is_rejected_before_decoding() -> None:
    normalise = ImageNormaliser(max_pixels=50_000_000, min_side_px=8, max_side_px=512)
    assert normalise(io.BytesIO(many_scans(100)))[1:3] == (16, 16)
    hostile = io.BytesIO(many_scans(900, side=3000))
    started = time.monotonic()
    assert error_class(normalise(hostile)) == "too_many_scans"
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("data", "scans"),
    [
        (b"", 0),
        (b"\xff\xd8", 0),
        (noise("JPEG"), 1),
        (noise("JPEG", progressive=True), 10),
        (noise("JPEG", exif=b"Exif\0\0" + b"\xff\xda\0\x02" * 200), 1),
        (noise("JPEG", comment=b"\xff\xda\0\x02" * 200), 1),
        (noise("JPEG") + b"\xff\xda\0\x02" * 200, 1),
        (b"\xff\xd8" + b"garbage\xff\x00\xff\xff\xff\xda\0\x02\xff\xd0" * 7, 7),
        (b"\xff\xd8" + b"\xff\xda\0\0" * 7, 7),
        (many_scans(500), 101),
    ],
)
def test_jpeg_scans_counts_markers_outside_segments(data: bytes, scans: int) -> None:
    assert jpeg_scans(data, most=101) == scans


def test_jpeg_scans_of_maximum_body_is_fast() -> None:
    started = time.monotonic()
    assert jpeg_scans(b"\xff\xd8\xff\xda\0\x02" + b"\xff\0" * 10_000_000, most=101) == 1
    assert time.monotonic() - started < 2
