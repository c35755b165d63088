import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from infra.download.images import ImageNormaliser, Normalised, as_stored, shrink_to_fit, to_rgb

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
BOUNDS = {"max_pixels": 50_000_000, "min_side_px": 8, "max_side_px": 512}


def normalised(data: bytes, **changes: int) -> Normalised:
    return ImageNormaliser(**{**BOUNDS, **changes})(io.BytesIO(data))


def stored_pixels(data: bytes, **changes: int) -> np.ndarray[Any, Any]:
    """Return the pixels (H, W, 3) of the stored image, after checking its reported sizes."""
    png, width, height, _, _, message = normalised(data, **changes)
    assert message is None
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
        return np.asarray(image)


def rejected(data: bytes, **changes: int) -> str:
    """Return the error class of a rejected image."""
    *nothing, message = normalised(data, **changes)
    assert nothing == [None] * 5
    assert message is not None
    assert " object at 0x" not in message, "messages are equal on every run: no memory address"
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
    """Build a PNG of a kind that Pillow does not write. ``rows`` are packed samples without filter bytes."""
    stride = len(rows) // height if height else 0
    lines = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride or 1))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    sized = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(sized)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000"])
def test_image_normaliser_lossless_formats_keep_pixels(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    image = Image.new("RGB", (16, 12), RED)
    image.paste(BLUE, (0, 0, 5, 5))
    assert (stored_pixels(encoded(image, form, **options)) == np.asarray(image)).all()


def test_image_normaliser_jpeg_pixels_are_close() -> None:
    assert np.abs(stored_pixels(encoded(plain(GREEN), "JPEG", quality=95)).astype(int) - GREEN).max() <= 3


@pytest.mark.parametrize(
    "data",
    [
        *[
            b"hello, this is not an image",
            b"<!doctype html><html></html>",
            b'{"error": "not found"}',
            b"BM",
            b"\0" * 100,
        ],
        b"<!doctype html><html><svg xmlns='http://www.w3.org/2000/svg'/></html>",
        b"<?xml version='1.0'?><feed><svg/></feed>",
    ],
)
def test_image_normaliser_other_data_is_not_an_image(data: bytes) -> None:
    assert rejected(data) == "not_an_image"


def test_image_normaliser_empty_data_is_empty_body() -> None:
    assert rejected(b"") == "empty_body"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_image_normaliser_truncated_image_is_decode_error(form: str, part: float) -> None:
    data = encoded(noise(), form)
    assert rejected(data[: int(len(data) * part)]) == "decode_error"


def test_image_normaliser_truncated_header_is_decode_error() -> None:
    for form in ("PNG", "JPEG", "GIF", "WEBP"):
        assert rejected(encoded(noise(), form)[:20]) == "decode_error"


def test_image_normaliser_corrupt_image_is_decode_error() -> None:
    data = bytearray(encoded(noise(), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    assert rejected(bytes(data)) == "decode_error"


def test_image_normaliser_small_side_is_too_small() -> None:
    assert rejected(encoded(plain(size=(1, 1)), "GIF")) == "too_small"
    assert rejected(encoded(plain(size=(400, 7)), "PNG")) == "too_small"
    assert stored_pixels(encoded(plain(size=(400, 8)), "PNG")).shape == (8, 400, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF"])
def test_image_normaliser_several_frames_are_animated(form: str) -> None:
    frames = [plain(GREEN), plain(BLUE)]
    assert rejected(encoded(plain(), form, save_all=True, append_images=frames)) == "animated"
    assert np.abs(stored_pixels(encoded(plain(), form, save_all=True)).astype(int) - RED).max() < 12


@pytest.mark.parametrize("form", ["MPO", "TIFF"])
def test_image_normaliser_several_stills_give_the_first(form: str) -> None:
    pages = [plain(BLACK, (8, 8)), plain(WHITE)]
    data = encoded(plain(GREEN), form, save_all=True, append_images=pages)
    assert np.abs(stored_pixels(data).astype(int) - GREEN).max() <= 3


# Above max_pixels only, with a warning of Pillow, with an error of Pillow.
@pytest.mark.parametrize("side", [7100, 12_000, 30_000])
def test_image_normaliser_decompression_bomb_is_rejected_by_header(side: int) -> None:
    assert rejected(png(8, 8, 8, 2, b"")) == "decode_error"  # the pixel data is missing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejected(png(side, side, 8, 2, b"")) == "too_many_pixels"


def test_image_normaliser_max_pixels_is_inclusive() -> None:
    data = encoded(plain(size=(20, 10)), "PNG")
    assert stored_pixels(data, max_pixels=200).shape == (10, 20, 3)
    assert rejected(data, max_pixels=199) == "too_many_pixels"


@pytest.mark.parametrize(
    ("inks", "colour"),
    [((0, 255, 255, 0), RED), ((255, 0, 255, 0), GREEN), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), BLACK)],
)
def test_image_normaliser_cmyk_jpeg_keeps_colours(inks: tuple[int, ...], colour: tuple[int, ...]) -> None:
    data = encoded(plain(inks, mode="CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data  # with this marker the inks are stored inverted
    assert np.abs(stored_pixels(data).astype(int) - colour).max() <= 3


DEEP = (
    np.repeat(np.array([0, 257, 0x1234, 0x8000, 0x01FF, 65535], dtype=np.uint16), 16).reshape(6, 16).T.repeat(2, axis=1)
)
SHALLOW = np.rint(DEEP / 257)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_image_normaliser_16_bit_greys_are_scaled(form: str) -> None:
    data = encoded(Image.fromarray(DEEP), form)
    assert Image.open(io.BytesIO(data)).mode in ("I;16", "I")
    assert (stored_pixels(data) == SHALLOW[..., None]).all()


def test_image_normaliser_big_endian_greys_are_scaled() -> None:
    tiff = struct.pack(">2sHI", b"MM", 42, 8) + struct.pack(">H", 8)
    values = {256: 12, 257: 16, 258: 16, 259: 1, 262: 1, 273: 8 + 2 + 8 * 12 + 4, 278: 16, 279: 12 * 16 * 2}
    tiff += b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in values.items()) + bytes(4)
    tiff += DEEP.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(tiff)).mode == "I;16B"
    assert (stored_pixels(tiff) == SHALLOW[..., None]).all()


def test_image_normaliser_16_bit_colours_keep_the_high_byte() -> None:
    colour = struct.pack(">HHH", 0xFFFF, 0x80FF, 0x1200)
    assert (stored_pixels(png(9, 8, 16, 2, colour * 72)) == (0xFF, 0x80, 0x12)).all()


def test_image_normaliser_16_bit_transparent_grey_becomes_white() -> None:
    rows = struct.pack(">8H", *[0x1000, 0x8000] * 4) * 8
    pixels = stored_pixels(png(8, 8, 16, 0, rows, (b"tRNS", struct.pack(">H", 0x1000))))
    assert pixels[0, :2, 0].tolist() == [255, 128]


@pytest.mark.parametrize(("values", "white"), [([0.0, 0.5, 1.0], 1.0), ([0.0, 128.0, 255.0], 255.0)])
def test_image_normaliser_float_greys_are_scaled_to_their_range(values: list[float], white: float) -> None:
    image = Image.fromarray(np.tile(np.array(values, dtype=np.float32), (8, 4)))
    expected = np.rint(np.array(values) * 255 / white)
    assert (stored_pixels(encoded(image, "TIFF"))[0, :3] == expected[:, None]).all()


def test_to_rgb_large_integers_are_scaled_to_the_brightest() -> None:
    image = Image.fromarray(np.array([[-1_000_000, 0, 1_200_000, 2_000_000]], dtype=np.int32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 153, 255]


def test_to_rgb_nan_and_infinite_values_are_black() -> None:
    image = Image.fromarray(np.array([[np.nan, np.inf, 1.0]], dtype=np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 255]


def halves(left: Any, right: Any, mode: str) -> Image.Image:
    image = Image.new(mode, (16, 8), right)
    image.paste(left, (0, 0, 8, 8))
    return image


def test_image_normaliser_transparent_palette_is_composited_on_white() -> None:
    image = halves(0, 1, "P")
    image.putpalette([*BLACK, *GREEN])
    for transparency, expected in (
        (0, [WHITE, GREEN]),
        (b"\xff\x00", [BLACK, WHITE]),
        (b"\x00\x80", [WHITE, (127, 255, 127)]),
    ):
        for form in ("PNG", "GIF") if isinstance(transparency, int) else ("PNG",):
            pixels = stored_pixels(encoded(image, form, transparency=transparency))
            assert np.abs(pixels[0, [0, 15]].astype(int) - expected).max() <= 1
    assert stored_pixels(encoded(image, "PNG"))[0, [0, 15]].tolist() == [list(BLACK), list(GREEN)]


def test_image_normaliser_transparent_colour_is_composited_on_white() -> None:
    colours = halves(RED, BLUE, "RGB")
    assert stored_pixels(encoded(colours, "PNG", transparency=RED))[0, [0, 15]].tolist() == [list(WHITE), list(BLUE)]
    greys = halves(7, 200, "L")
    assert stored_pixels(encoded(greys, "PNG", transparency=7))[0, [0, 15], 0].tolist() == [255, 200]


@pytest.mark.parametrize(
    ("mode", "left", "right", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (0, 0, 255, 255), [WHITE, BLUE]),
        ("RGBA", (0, 0, 0, 128), (255, 0, 0, 64), [(127, 127, 127), (255, 191, 191)]),
        ("LA", (0, 0), (90, 255), [WHITE, (90, 90, 90)]),
        ("LA", (0, 128), (0, 255), [(127, 127, 127), BLACK]),
    ],
)
def test_image_normaliser_alpha_is_composited_on_white(
    mode: str, left: Any, right: Any, expected: list[tuple[int, ...]]
) -> None:
    pixels = stored_pixels(encoded(halves(left, right, mode), "PNG"))
    assert np.abs(pixels[0, [0, 15]].astype(int) - expected).max() <= 1


def test_image_normaliser_one_bit_image_is_black_and_white() -> None:
    assert stored_pixels(encoded(halves(0, 1, "1"), "PNG"))[0, [0, 15]].tolist() == [list(BLACK), list(WHITE)]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_to_rgb_accepts_every_mode_and_keeps_the_original(mode: str) -> None:
    image = Image.new(mode, (5, 3))
    image.info["icc_profile"] = b"profile"
    before = image.tobytes()
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size, rgb.info) == ("RGB", (5, 3), {})
    assert rgb is not image
    assert (image.mode, image.tobytes(), image.info) == (mode, before, {"icc_profile": b"profile"})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_image_normaliser_applies_the_exif_orientation(orientation: int, form: str) -> None:
    image = Image.new("RGB", (24, 16), WHITE)
    image.paste(RED, (0, 0, 12, 8))
    image.paste(BLUE, (12, 0, 24, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    data = encoded(image, form, exif=exif, **options)
    image.info["exif"] = exif.tobytes()
    upright = ImageOps.exif_transpose(image)
    _, width, height, original_width, original_height, _ = normalised(data)
    assert (width, height) == (original_width, original_height) == upright.size
    assert np.abs(stored_pixels(data).astype(int) - np.asarray(upright)).max() <= 3


@pytest.mark.parametrize(
    ("tag", "kind", "count", "value"),
    [
        (0x010F, 2, 100, 0xFFFFFF),
        (0x8769, 4, 1, 0xFFFFFF),
        (0x8825, 4, 1, 8),
        (0x011A, 5, 1, 0xFFFFFF),
        (0x0110, 99, 1, 5),
    ],
)
def test_image_normaliser_applies_the_orientation_beside_a_damaged_tag(
    tag: int, kind: int, count: int, value: int
) -> None:
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", tag, kind, count, value)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    data = encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)
    assert stored_pixels(data).shape[:2] == (40, 20)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*", b"Exif\0\0XX\0*\0\0\0\x08 broken"])
def test_image_normaliser_unreadable_exif_is_ignored(exif: bytes, form: str) -> None:
    assert np.abs(stored_pixels(encoded(plain(GREEN), form, exif=exif)).astype(int) - GREEN).max() <= 3


def test_image_normaliser_large_image_is_reduced() -> None:
    data = encoded(halves(RED, BLUE, "RGB").resize((1000, 500), Image.Resampling.NEAREST), "PNG")
    _, width, height, original_width, original_height, _ = normalised(data, max_side_px=100)
    assert (width, height, original_width, original_height) == (100, 50, 1000, 500)
    pixels = stored_pixels(data, max_side_px=100)
    assert pixels[25, [5, 95]].tolist() == [list(RED), list(BLUE)]
    assert stored_pixels(data, max_side_px=1000).shape == (500, 1000, 3)
    assert stored_pixels(data, max_side_px=2000).shape == (500, 1000, 3)  # never enlarged


def test_image_normaliser_reduction_averages_pixels() -> None:
    checks = np.indices((128, 128)).sum(axis=0) % 2 * np.uint8(255)
    pixels = stored_pixels(encoded(Image.fromarray(checks.astype(np.uint8)), "PNG"), max_side_px=32)
    assert np.abs(pixels[4:-4, 4:-4].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(4000, 60), (60, 4000)])
def test_image_normaliser_narrow_image_is_checked_as_stored(size: tuple[int, int]) -> None:
    height, width, _ = stored_pixels(encoded(plain(size=size), "PNG")).shape
    assert sorted((width, height)) == [8, 512]
    assert rejected(encoded(plain(size=size), "PNG"), max_side_px=256) == "too_small"
    assert shrink_to_fit(plain(size=(10_000, 1)), 10).size == (10, 1)


def test_as_stored_gives_the_pixels_that_would_be_stored() -> None:
    for image in (noise((4000, 60)), noise(), halves((255, 0, 0, 0), BLUE, "RGBA")):
        assert (np.asarray(as_stored(image, 512)) == stored_pixels(encoded(image, "PNG"))).all()


def test_decode_first_frame_accepts_an_animation() -> None:
    animation = encoded(plain(), "GIF", save_all=True, append_images=[plain(GREEN)])
    assert ImageNormaliser(**BOUNDS).decode(animation, first_frame=True).getpixel((0, 0)) == RED


def test_image_normaliser_bytes_are_reproducible_without_metadata() -> None:
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


def test_image_normaliser_unexpected_exception_is_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Image.Image) -> Image.Image:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("infra.download.images.to_rgb", broken)
    assert rejected(encoded(plain(), "PNG")) == "internal_error"


def test_image_normaliser_corrupt_bytes_never_raise() -> None:
    random = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        whole = np.frombuffer(encoded(noise((32, 24)), form), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[random.integers(0, min(len(whole), 200), 4)] = random.integers(0, 256, 4)
            message = normalised(damaged.tobytes())[-1]
            assert message is None or not message.startswith("internal_error"), message
