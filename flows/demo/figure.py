"""Figure of the demo: prompts, their neighbours and the generated images, per database."""

import dataclasses
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL_PX = 72
_GAP_PX, _GROUP_GAP_PX, _MARGIN_PX, _NOTE_PX = 6, 26, 20, 34
_INK, _FAINT, _PAPER, _SHADE = (25, 28, 33), (110, 116, 125), (255, 255, 255), (244, 245, 247)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SwapRow:
    """One prompt, the groups of images in its row, and a note below the prompt."""

    prompt: str
    groups: tuple[Sequence[Image.Image], ...]
    note: str = ""


def draw_swap(rows: Sequence[SwapRow], titles: Sequence[str], note: str = "") -> Image.Image:
    """Render a labelled grid: one row per prompt, one group of columns per entry of ``titles``, and ``note`` below.

    Every second group (the generated images) has a shaded background, to distinguish samples from neighbours.
    """
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    label_px = max(int(font.getlength(row.prompt)) for row in rows) + _GROUP_GAP_PX
    widths = [len(group) * (CELL_PX + _GAP_PX) - _GAP_PX for group in rows[0].groups]
    lefts = [_MARGIN_PX + label_px + sum(widths[:n]) + n * _GROUP_GAP_PX for n in range(len(widths))]
    top = _MARGIN_PX + 34
    height = top + len(rows) * (CELL_PX + _GAP_PX) + _MARGIN_PX
    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + _MARGIN_PX, height + (_NOTE_PX if note else 0)), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    canvas.text((_MARGIN_PX, height), note, font=small, fill=_FAINT)
    for number, (left, width, title) in enumerate(zip(lefts, widths, titles, strict=True)):
        if number % 2:
            box = (left - 9, _MARGIN_PX - 10, left + width + 9, height - _MARGIN_PX + 6)
            canvas.rounded_rectangle(box, radius=8, fill=_SHADE)
        canvas.text((left, _MARGIN_PX), title, font=small, fill=_FAINT)
    for number, row in enumerate(rows):
        y = top + number * (CELL_PX + _GAP_PX)
        middle = y + CELL_PX // 2
        canvas.text((_MARGIN_PX, middle), row.prompt, font=font, fill=_INK, anchor="lm")
        canvas.text((_MARGIN_PX, middle + 20), row.note, font=small, fill=_FAINT, anchor="lm")
        for left, group in zip(lefts, row.groups, strict=True):
            for column, image in enumerate(group):
                sheet.paste(_cell(image), (left + column * (CELL_PX + _GAP_PX), y))
    return sheet


def _cell(image: Image.Image) -> Image.Image:
    """Resize ``image`` to fit a cell, with its aspect ratio."""
    cell = Image.new("RGB", (CELL_PX, CELL_PX), _PAPER)
    scale = CELL_PX / max(image.size)
    fitted = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    cell.paste(fitted, ((CELL_PX - fitted.width) // 2, (CELL_PX - fitted.height) // 2))
    return cell
