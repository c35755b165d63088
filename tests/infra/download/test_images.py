import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from infra.download.images import ImageNormaliser, Normalised, shrink_to_fit, to_rgb

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
BOUNDS = {"max_pixels": 50_000_000, "min_side_px": 8, "max_side_px": 512}


def normalised(data: bytes, **changes: int) -> Normalised:
    return ImageNormaliser(**{**BOUNDS, **changes})(io.BytesIO(data))


def taken(data: bytes, **changes: int) -> np.ndarray[Any, Any]:
    """The stored picture's pixels (H, W, 3), its reported sizes checked."""
    png, width, height, _, _, message = normalised(data, **changes)
    assert message is None
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
        return np.asarray(image)


def refused(data: bytes, **changes: int) -> str:
    """The error class of a picture that is not taken."""
    *nothing, message = normalised(data, **changes)
    assert nothing == [None] * 5
    assert message is not None
    assert " object at 0x" not in message, "no memory address: messages are the same on every run"
    return message.partition(":")[0]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(colour: Any = RED, size: tuple[int, int] = (16, 12), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, for what Pillow does not write. ``rows`` are packed samples without filter bytes."""
    stride = len(rows) // height if height else 0
    lines = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride or 1))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    sized = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(sized)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000"])
def test_lossless_formats_keep_their_pixels(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    picture = Image.new("RGB", (16, 12), RED)
    picture.paste(BLUE, (0, 0, 5, 5))
    assert (taken(encoded(picture, form, **options)) == np.asarray(picture)).all()


def test_a_jpeg_keeps_its_pixels_nearly() -> None:
    assert np.abs(taken(encoded(plain(GREEN), "JPEG", quality=95)).astype(int) - GREEN).max() <= 3


@pytest.mark.parametrize(
    "data",
    [
        *[b"hello, this is no picture", b"<!doctype html><html></html>", b'{"error": "not found"}', b"BM", b"\0" * 100],
        *[b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
    ],
)
def test_what_is_no_image(data: bytes) -> None:
    assert refused(data) == "not_an_image"


def test_nothing_at_all() -> None:
    assert refused(b"") == "empty_body"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_truncated_image(form: str, part: float) -> None:
    data = encoded(noise(), form)
    assert refused(data[: int(len(data) * part)]) == "decode_error"


def test_a_image_cut_within_its_header() -> None:
    for form in ("PNG", "JPEG", "GIF", "WEBP"):
        assert refused(encoded(noise(), form)[:20]) == "decode_error"


def test_a_corrupt_image() -> None:
    data = bytearray(encoded(noise(), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    assert refused(bytes(data)) == "decode_error"


def test_a_tracking_pixel() -> None:
    assert refused(encoded(plain(size=(1, 1)), "GIF")) == "too_small"
    assert refused(encoded(plain(size=(400, 7)), "PNG")) == "too_small"
    assert taken(encoded(plain(size=(400, 8)), "PNG")).shape == (8, 400, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_several_frames(form: str) -> None:
    frames = [plain(GREEN), plain(BLUE)]
    assert refused(encoded(plain(), form, save_all=True, append_images=frames)) == "animated"
    assert np.abs(taken(encoded(plain(), form, save_all=True)).astype(int) - RED).max() < 12


def test_a_camera_jpeg_with_an_extra_map_is_a_still_image() -> None:
    data = encoded(plain(GREEN), "MPO", save_all=True, append_images=[plain(BLACK, (8, 8))])
    assert np.abs(taken(data).astype(int) - GREEN).max() <= 3


@pytest.mark.parametrize("side", [7100, 12_000, 30_000])  # ours alone, with Pillow's warning, with Pillow's error
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    assert refused(png(8, 8, 8, 2, b"")) == "decode_error"  # a decoder finds that the pixels are missing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(png(side, side, 8, 2, b"")) == "too_many_pixels"


def test_the_pixel_bound_is_inclusive() -> None:
    data = encoded(plain(size=(20, 10)), "PNG")
    assert taken(data, max_pixels=200).shape == (10, 20, 3)
    assert refused(data, max_pixels=199) == "too_many_pixels"


@pytest.mark.parametrize(
    ("inks", "colour"),
    [((0, 255, 255, 0), RED), ((255, 0, 255, 0), GREEN), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), BLACK)],
)
def test_cmyk_jpegs_come_out_in_their_colours(inks: tuple[int, ...], colour: tuple[int, ...]) -> None:
    data = encoded(plain(inks, mode="CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data  # the marker with which the inks are stored inverted
    assert np.abs(taken(data).astype(int) - colour).max() <= 3


DEEP = (
    np.repeat(np.array([0, 257, 0x1234, 0x8000, 0x01FF, 65535], dtype=np.uint16), 16).reshape(6, 16).T.repeat(2, axis=1)
)
SHALLOW = np.rint(DEEP / 257)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greys_are_scaled_not_clipped(form: str) -> None:
    data = encoded(Image.fromarray(DEEP), form)
    assert Image.open(io.BytesIO(data)).mode in ("I;16", "I")
    assert (taken(data) == SHALLOW[..., None]).all()


def test_big_endian_greys_are_scaled_too() -> None:
    tiff = struct.pack(">2sHI", b"MM", 42, 8) + struct.pack(">H", 8)
    values = {256: 12, 257: 16, 258: 16, 259: 1, 262: 1, 273: 8 + 2 + 8 * 12 + 4, 278: 16, 279: 12 * 16 * 2}
    tiff += b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in values.items()) + bytes(4)
    tiff += DEEP.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(tiff)).mode == "I;16B"
    assert (taken(tiff) == SHALLOW[..., None]).all()


def test_sixteen_bit_colours_keep_their_high_byte() -> None:
    colour = struct.pack(">HHH", 0xFFFF, 0x80FF, 0x1200)
    assert (taken(png(9, 8, 16, 2, colour * 72)) == (0xFF, 0x80, 0x12)).all()


def test_a_sixteen_bit_transparent_grey_is_white() -> None:
    rows = struct.pack(">8H", *[0x1000, 0x8000] * 4) * 8
    pixels = taken(png(8, 8, 16, 0, rows, (b"tRNS", struct.pack(">H", 0x1000))))
    assert pixels[0, :2, 0].tolist() == [255, 128]


@pytest.mark.parametrize(("values", "white"), [([0.0, 0.5, 1.0], 1.0), ([0.0, 128.0, 255.0], 255.0)])
def test_floating_greys_are_scaled_to_their_range(values: list[float], white: float) -> None:
    image = Image.fromarray(np.tile(np.array(values, dtype=np.float32), (8, 4)))
    expected = np.rint(np.array(values) * 255 / white)
    assert (taken(encoded(image, "TIFF"))[0, :3] == expected[:, None]).all()


def test_integers_beyond_sixteen_bits_are_scaled_to_the_brightest() -> None:
    image = Image.fromarray(np.array([[-1_000_000, 0, 1_200_000, 2_000_000]], dtype=np.int32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 153, 255]


def test_values_that_are_no_numbers_are_black() -> None:
    image = Image.fromarray(np.array([[np.nan, np.inf, 1.0]], dtype=np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 255]


def halves(left: Any, right: Any, mode: str) -> Image.Image:
    image = Image.new(mode, (16, 8), right)
    image.paste(left, (0, 0, 8, 8))
    return image


def test_a_palette_with_transparency_is_laid_on_white() -> None:
    image = halves(0, 1, "P")
    image.putpalette([*BLACK, *GREEN])
    for transparency, seen in (
        (0, [WHITE, GREEN]),
        (b"\xff\x00", [BLACK, WHITE]),
        (b"\x00\x80", [WHITE, (127, 255, 127)]),
    ):
        for form in ("PNG", "GIF") if isinstance(transparency, int) else ("PNG",):
            pixels = taken(encoded(image, form, transparency=transparency))
            assert np.abs(pixels[0, [0, 15]].astype(int) - seen).max() <= 1
    assert taken(encoded(image, "PNG"))[0, [0, 15]].tolist() == [list(BLACK), list(GREEN)]


def test_a_transparent_colour_is_laid_on_white() -> None:
    colours = halves(RED, BLUE, "RGB")
    assert taken(encoded(colours, "PNG", transparency=RED))[0, [0, 15]].tolist() == [list(WHITE), list(BLUE)]
    greys = halves(7, 200, "L")
    assert taken(encoded(greys, "PNG", transparency=7))[0, [0, 15], 0].tolist() == [255, 200]


@pytest.mark.parametrize(
    ("mode", "left", "right", "seen"),
    [
        ("RGBA", (255, 0, 0, 0), (0, 0, 255, 255), [WHITE, BLUE]),
        ("RGBA", (0, 0, 0, 128), (255, 0, 0, 64), [(127, 127, 127), (255, 191, 191)]),
        ("LA", (0, 0), (90, 255), [WHITE, (90, 90, 90)]),
        ("LA", (0, 128), (0, 255), [(127, 127, 127), BLACK]),
    ],
)
def test_alpha_is_laid_on_white(mode: str, left: Any, right: Any, seen: list[tuple[int, ...]]) -> None:
    pixels = taken(encoded(halves(left, right, mode), "PNG"))
    assert np.abs(pixels[0, [0, 15]].astype(int) - seen).max() <= 1


def test_one_bit_images() -> None:
    assert taken(encoded(halves(0, 1, "1"), "PNG"))[0, [0, 15]].tolist() == [list(BLACK), list(WHITE)]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_to_rgb_takes_every_mode_and_leaves_the_original(mode: str) -> None:
    image = Image.new(mode, (5, 3))
    image.info["icc_profile"] = b"profile"
    before = image.tobytes()
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size, rgb.info) == ("RGB", (5, 3), {})
    assert rgb is not image
    assert (image.mode, image.tobytes(), image.info) == (mode, before, {"icc_profile": b"profile"})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(orientation: int, form: str) -> None:
    picture = Image.new("RGB", (24, 16), WHITE)
    picture.paste(RED, (0, 0, 12, 8))
    picture.paste(BLUE, (12, 0, 24, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    data = encoded(picture, form, exif=exif, **options)
    picture.info["exif"] = exif.tobytes()
    upright = ImageOps.exif_transpose(picture)
    _, width, height, original_width, original_height, _ = normalised(data)
    assert (width, height) == (original_width, original_height) == upright.size
    assert np.abs(taken(data).astype(int) - np.asarray(upright)).max() <= 3


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*", b"Exif\0\0XX\0*\0\0\0\x08 broken"])
def test_unreadable_exif_costs_nothing(exif: bytes, form: str) -> None:
    assert np.abs(taken(encoded(plain(GREEN), form, exif=exif)).astype(int) - GREEN).max() <= 3


def test_large_images_are_reduced() -> None:
    data = encoded(halves(RED, BLUE, "RGB").resize((1000, 500), Image.Resampling.NEAREST), "PNG")
    _, width, height, original_width, original_height, _ = normalised(data, max_side_px=100)
    assert (width, height, original_width, original_height) == (100, 50, 1000, 500)
    pixels = taken(data, max_side_px=100)
    assert pixels[25, [5, 95]].tolist() == [list(RED), list(BLUE)]
    assert taken(data, max_side_px=1000).shape == (500, 1000, 3)
    assert taken(data, max_side_px=2000).shape == (500, 1000, 3)  # never enlarged


def test_reducing_averages() -> None:
    checks = np.indices((128, 128)).sum(axis=0) % 2 * np.uint8(255)
    pixels = taken(encoded(Image.fromarray(checks.astype(np.uint8)), "PNG"), max_side_px=32)
    assert np.abs(pixels[4:-4, 4:-4].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(8000, 8), (8, 8000)])
def test_a_lopsided_image_keeps_a_pixel(size: tuple[int, int]) -> None:
    height, width, _ = taken(encoded(plain(size=size), "PNG"), max_side_px=64).shape
    assert sorted((width, height)) == [1, 64]
    assert shrink_to_fit(plain(size=(10_000, 1)), 10).size == (10, 1)


def test_the_same_image_gives_the_same_bytes_and_nothing_besides_pixels() -> None:
    data = encoded(noise(), "JPEG", icc_profile=b"profile" * 20, comment=b"hello", dpi=(72, 72))
    stored = normalised(data)[0]
    assert stored is not None
    assert stored == normalised(data)[0]
    names, at = [], 8
    while at < len(stored):
        (length,) = struct.unpack(">I", stored[at : at + 4])
        names.append(stored[at + 4 : at + 8])
        at += length + 12
    assert set(names) == {b"IHDR", b"IDAT", b"IEND"}


def test_an_unforeseen_failure_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Image.Image) -> Image.Image:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("infra.download.images.to_rgb", broken)
    assert refused(encoded(plain(), "PNG")) == "internal_error"


def test_damaged_bytes_never_raise() -> None:
    random = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        whole = np.frombuffer(encoded(noise((32, 24)), form), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[random.integers(0, min(len(whole), 200), 4)] = random.integers(0, 256, 4)
            message = normalised(damaged.tobytes())[-1]
            assert message is None or not message.startswith("internal_error"), message
