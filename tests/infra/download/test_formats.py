"""Formats beyond Pillow's own, and colour profiles."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.hostile_images import encoded

from infra.download.colour import to_srgb
from infra.download.formats import format_of
from infra.download.images import ImageError, ImageNormaliser

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


def decode(data: bytes) -> Image.Image:
    return ImageNormaliser(max_pixels=1_000_000, min_side_px=8, max_side_px=64).decode(data)


def error_of(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return str(caught.value)


def two_colours(size: tuple[int, int] = (32, 16)) -> Image.Image:
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize(("form", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_decode_format_of_an_extra(form: str, module: str) -> None:
    pytest.importorskip(module)
    ImageNormaliser(max_pixels=1, min_side_px=1, max_side_px=1)  # registers the plugins
    data = encoded(two_colours(), form, quality=95)
    pixels = np.asarray(decode(data), dtype=int)
    assert np.abs(pixels[8, [4, 28]] - [RED, BLUE]).max() < 20
    assert error_of(data[: len(data) // 2]).startswith("decode_error")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x1cftypheic" + bytes(40), r"HEIC; to decode it, pip install 'knn-diffusion\[formats\]'"),
        (b"\xff\x0a" + bytes(40), r"JPEG XL; to decode it, pip install 'knn-diffusion\[jxl\]'"),
        (f"<svg xmlns='{SVG}'/>".encode(), r"SVG; to decode it, pip install 'knn-diffusion\[formats\]'"),
        (b"8BPS" + bytes(40), "Photoshop; convert it to .*PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS; convert it to .*PNG"),
        (b"%PDF-1.7\n", "PDF; convert it to .*PNG"),
    ],
)
def test_decode_without_the_library_names_the_format(
    data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = {"pillow_heif", "pillow_jxl", "resvg_py"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(ImageError, match=f"^unsupported_format: {message}"):
        decode(data)


def test_format_of_avif_with_a_general_brand_is_not_heic() -> None:
    assert format_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif") is None
    assert format_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic") == "HEIC"


def test_decode_icon_gives_its_largest_image() -> None:
    data = encoded(two_colours((48, 48)), "ICO", sizes=[(16, 16), (48, 48)])
    image = decode(data)
    assert (image.size, image.getpixel((2, 2)), image.getpixel((40, 2))) == ((48, 48), RED, BLUE)
    assert error_of(data[:200]).startswith("decode_error")


PROLOGS = {
    "none": "",
    "declaration": '<?xml version="1.0" encoding="UTF-8"?>\n<!-- drawn by hand -->\n',
    "doctype": '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">',
    "entities": f'<!DOCTYPE svg [<!ENTITY ns "{SVG}"> <!ENTITY red "#ff0000">]>',
    "byte order mark": "\ufeff",
}


@pytest.mark.parametrize("prolog", PROLOGS.values(), ids=list(PROLOGS))
def test_decode_svg_is_rendered_on_white_as_large_as_images_are_stored(prolog: str) -> None:
    drawing = f'<svg xmlns="{SVG}" viewBox="0 0 20 10"><rect width="10" height="10" fill="#ff0000"/></svg>'
    image = decode((prolog + drawing).encode())
    assert (image.size, image.getpixel((5, 5)), image.getpixel((60, 5))) == ((64, 32), RED, WHITE)


def test_decode_tall_svg_keeps_its_aspect() -> None:
    assert decode(f'<svg xmlns="{SVG}" width="10" height="40px"/>'.encode()).size == (16, 64)


@pytest.mark.parametrize("svg", [f"<svg xmlns='{SVG}'><g></svg>", "<svg>&unknown;</svg>", "<svg "])
def test_decode_invalid_svg_is_decode_error(svg: str) -> None:
    assert error_of(svg.encode()).startswith("decode_error")


@pytest.mark.parametrize(
    "reference", ['href="{0}"', 'xlink:href="{0}"', 'href=" file://{0}"', 'href="&file;"', 'x:HREF="{0}"']
)
def test_decode_svg_cannot_read_files(reference: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (20, 10), BLUE).save(secret)
    attribute = reference.format(secret)
    svg = (
        f'<!DOCTYPE svg [<!ENTITY file "{secret}">]><svg xmlns="{SVG}" xmlns:xlink="{XLINK}" xmlns:x="{XLINK}" '
        f'viewBox="0 0 20 10"><image {attribute} width="20" height="10"/></svg>'
    )
    assert decode(svg.encode()).getcolors() == [(64 * 32, WHITE)]


def test_decode_svg_draws_embedded_images_and_its_own_elements(tmp_path: Path) -> None:
    import base64

    content = base64.b64encode(encoded(Image.new("RGB", (4, 4), BLUE), "PNG")).decode()
    svg = (
        f'<svg xmlns="{SVG}" viewBox="0 0 20 10"><defs><rect id="r" width="10" height="10" fill="red"/></defs>'
        f'<use href="#r"/><image href="data:image/png;base64,{content}" x="10" width="10" height="10"/></svg>'
    )
    image = decode(svg.encode())
    assert (image.getpixel((5, 16)), image.getpixel((48, 16))) == (RED, BLUE)


def swapped_profile() -> bytes:
    """Return the profile of a space whose red primary is the green one of sRGB, and the reverse."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_decode_profile_is_converted_to_srgb(form: str) -> None:
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(form, {})
    data = encoded(Image.new("RGB", (16, 16), (255, 0, 0)), form, icc_profile=swapped_profile(), **options)
    assert np.abs(np.asarray(decode(data), dtype=int) - (0, 255, 0)).max() <= 4


@pytest.mark.parametrize("mode", ["P", "RGBA", "PA"])
def test_to_srgb_keeps_transparency(mode: str) -> None:
    image = Image.new("RGBA", (16, 8), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (8, 0, 16, 8))
    image = image.convert(mode) if mode != "P" else image.convert("RGB").convert("P")
    image.info["icc_profile"] = swapped_profile()
    converted = to_srgb(image).convert("RGBA")
    assert np.abs(np.asarray(converted)[0, 0].astype(int) - (0, 255, 0, 255)).max() <= 2
    if mode != "P":
        assert converted.getchannel("A").getpixel((12, 4)) == 0


@pytest.mark.parametrize("profile", [None, SRGB, b"", b"profile" * 40, SRGB[:200]])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "1", "I;16"])
def test_to_srgb_without_another_usable_profile_returns_the_image_itself(profile: bytes | None, mode: str) -> None:
    image = Image.new(mode, (16, 8))
    if profile is not None:
        image.info["icc_profile"] = profile
    assert to_srgb(image) is image
