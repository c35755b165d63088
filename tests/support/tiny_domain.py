"""A small domain: synthetic images on a loopback server, with bad ones of every kind, and the flow."""

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from support.fakes import LoopbackServer, Reply, WithoutRay

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "pink")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
SIDE = 48
SHARD_ROWS = 16
NEIGHBOURS = 4


def drawn(colour: str, shape: str, side: int = SIDE) -> Image.Image:
    """Draw a coloured shape on white."""
    image = Image.new("RGB", (side, side), "white")
    canvas, a, b = ImageDraw.Draw(image), side // 6, side - side // 6
    box = (a, a, b, b)
    match shape:
        case "circle":
            canvas.ellipse(box, fill=colour)
        case "square":
            canvas.rectangle(box, fill=colour)
        case "triangle":
            canvas.polygon([(side // 2, a), (a, b), (b, b)], fill=colour)
        case "cross":
            canvas.line((a, a, b, b), fill=colour, width=side // 6)
            canvas.line((a, b, b, a), fill=colour, width=side // 6)
        case "ring":
            canvas.ellipse(box, outline=colour, width=side // 8)
        case _:
            canvas.rectangle((a, side // 3, b, side - side // 3), fill=colour)
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def good_replies() -> dict[str, Reply]:
    """Return one PNG for each colour and shape."""
    return {
        f"/{colour}-{shape}.png": Reply(body=encoded(drawn(colour, shape))) for colour in COLOURS for shape in SHAPES
    }


def odd_replies() -> dict[str, tuple[Reply, str]]:
    """Return bad and unusual images, each with its expected outcome."""
    image = drawn("red", "circle")
    frames = [drawn(colour, "square") for colour in COLOURS[:3]]
    grey = Image.fromarray((np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE)).astype(np.uint16))
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    return {
        "/corrupt.png": (Reply(body=encoded(image)[:40] + b"\0" * 200), "decode_error"),
        "/truncated.png": (Reply(body=encoded(image)[:-60]), "decode_error"),
        "/tiny.png": (Reply(body=encoded(Image.new("RGB", (1, 1)))), "too_small"),
        "/animated.gif": (Reply(body=encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), "animated"),
        "/cmyk.jpg": (Reply(body=encoded(image.convert("CMYK"), "JPEG")), "success"),
        "/grey16.png": (Reply(body=encoded(grey)), "success"),
        "/palette.png": (Reply(body=encoded(palette)), "success"),
        "/bomb.png": (Reply(body=encoded(Image.new("1", (12_000, 12_000)))), "too_many_pixels"),
        "/text.png": (Reply(body=b"this is a sentence, not an image"), "not_an_image"),
        "/absent.png": (Reply(status=404), "http_404"),
        "/inward.png": (Reply.redirect("http://127.0.0.1:9/secret.png"), "blocked_address"),
    }


@dataclasses.dataclass(frozen=True)
class SmallDomain:
    """Server, URL list, config and result of the flow."""

    server: LoopbackServer
    root: Path
    urls: Path
    config: Any
    result: Any


def write_urls(path: Path, urls: list[str]) -> Path:
    """Write a URL list as JSON lines, and return its path."""
    path.write_text("".join(json.dumps({"url": url}) + "\n" for url in urls))
    return path


def small_config(urls: Path, root: Path, host: str, *, train: bool = True, images: int = 512) -> Any:
    """Return the config of the flow for the small domain: one worker, tiny network."""
    from flows.new_domain import NewDomainConfig
    from infra.download.downloader import DownloadPolicy
    from model.configs import ConditioningConfig, TrainingConfig, TransformerConfig
    from tasks.download.config import DownloadConfig
    from tasks.embed.task import EmbedConfig
    from tasks.evaluate.task import EvaluateConfig
    from tasks.index.config import IndexConfig
    from tasks.train.config import TrainConfig

    texts = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    policy = DownloadPolicy(allow_hosts=(host,), threads=4, retries=0)
    training = TrainingConfig(
        images=images,
        batch_size=8,
        warmup_images=64,
        checkpoint_images=64,
        log_images=32,
        ema_decay=0.9,
        grid_images=256,
    )
    return NewDomainConfig(
        domain="shapes",
        urls=str(urls),
        root=str(root),
        download=DownloadConfig(shard_rows=SHARD_ROWS, policy=policy, workers=1),
        embed=EmbedConfig(workers=1, batch_size=8),
        index=IndexConfig(texts=texts, recall_queries=32),
        train=TrainConfig(
            network=TransformerConfig(image_size=16, patch_size=4, layers=2, heads=2, head_width=16),
            conditioning=ConditioningConfig(neighbours=NEIGHBOURS, pool=NEIGHBOURS),
            training=training,
            cpus_per_worker=1,
        )
        if train
        else None,
        evaluate=EvaluateConfig(prompts=texts, samples=24, steps=4),
    )


@contextmanager
def made(root: Path, migrated_database: Path) -> Iterator[SmallDomain]:
    """Serve the images, run the flow once, and keep the server running.

    Neighbours, training and evaluation run on Ray; tests/flows/test_kills.py runs the other stages on it.
    """
    from flows.new_domain import new_domain

    replies = good_replies() | {path: reply for path, (reply, _) in odd_replies().items()}
    with LoopbackServer(replies) as server:
        urls = write_urls(root / "urls.jsonl", [server.url(path) for path in replies])
        config = small_config(urls, root / "data", server.host)
        (root / "data").mkdir()
        shutil.copy(migrated_database, root / "data" / "mlflow.db")
        with pytest.MonkeyPatch.context() as patch:
            WithoutRay(on_ray={"neighbours", "measure"}).install(patch)
            result = new_domain(config)
        yield SmallDomain(server=server, root=root / "data", urls=urls, config=config, result=result)
