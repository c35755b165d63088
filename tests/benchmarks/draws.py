"""Images of prompts by the bundled generator. Candidates are generated once, and each condition selects among them.

A condition returns the images of a call of the pipeline with its arguments. Candidates are independent of each other,
so conditions that differ in nothing but their number share them. Draws and conditions are cached below
``build/bench/prompts``, by the digest of their settings.

Legend: ``N`` prompts, ``M`` images of a database, ``C`` candidates, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from domains import BENCH, Drawings, write_whole
from names import DEFAULTS
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from model.encoder.clip import Encoder
from model.generation.backbone import Backbone
from model.generation.condition import Condition
from model.generation.quality import PRESETS
from model.generation.sampling import COPY, best_candidates, rows_not_to_copy
from model.metrics.embedding_metrics import Embeddings
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import BUNDLED_GENERATOR, weights_digest

SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The prompts of a run.

    Attributes:
        numbers: (N,), their numbers among all prompts.
        texts: (N, D), their embeddings.
        own: (N, M), True for the images that are left out.
    """

    numbers: NDArray[np.int64]
    texts: Embeddings
    own: NDArray[np.bool_]

    def noise(self, backbone: Backbone, candidates: int, steps: int) -> Tensor:
        """Return the noise of all candidates, prompt after prompt. A candidate's depends only on prompt and number."""
        generators = [torch.Generator().manual_seed(SEED + int(number)) for number in self.numbers]
        return torch.cat([backbone.noise(candidates, steps, generator) for generator in generators])

    def digest(self) -> str:
        """Return a digest of the prompts and of the images that their words leave out."""
        parts = (self.numbers, self.texts, self.own)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Studio:
    """Generates the images of the prompts of one database.

    Attributes:
        pipeline: The generator, with the database plugged in.
        encoder: The encoder that selects.
        source: The images of the database.
        asked: The prompts.
    """

    pipeline: KNNDiffusionPipeline
    encoder: Encoder
    source: Drawings
    asked: Asked

    def generated(self, options: dict[str, Any]) -> tuple[NDArray[np.uint8], float]:
        """Return one image (N, S, S, 3) for each prompt, and the seconds per image; computed once."""
        preset = PRESETS.get(options.get("quality", ""))
        settings = {"preset": None if preset is None else dataclasses.asdict(preset), "options": options, "copy": COPY}
        path = self._path(settings)
        if not path.exists():
            call = {} if preset is None else {k: v for k, v in dataclasses.asdict(preset).items() if v is not None}
            call |= {name: value for name, value in options.items() if name != "quality"}
            pixels, seconds = self.select(call.pop("candidates", self.pipeline.config["candidates"]), call)
            write_whole(path, lambda file: np.savez(file, pixels=pixels, seconds=seconds))
        with np.load(path) as stored:
            return stored["pixels"], float(stored["seconds"])

    def select(self, candidates: int, call: dict[str, Any]) -> tuple[NDArray[np.uint8], float]:
        """Return the candidate (N, S, S, 3) of each prompt that the pipeline chooses, and the seconds."""
        draws = [self.draw(number, call) for number in range(candidates)]
        pixels, seconds = np.stack([images for images, _ in draws]), sum(seconds for _, seconds in draws)
        if candidates == 1:
            return pixels[0], seconds
        embeddings = torch.stack([self.encoder.embed_pixels(images) for images in pixels], dim=1).flatten(0, 1)
        neighbours = None
        if call.get("start") == "neighbour":
            neighbours = rows_not_to_copy(self._condition(call).hits, 1)
        rows = best_candidates(embeddings, torch.from_numpy(self._targets(call)), neighbours).numpy()
        return pixels.swapaxes(0, 1).reshape(-1, *pixels.shape[2:])[rows], seconds

    def draw(self, number: int, call: dict[str, Any]) -> tuple[NDArray[np.uint8], float]:
        """Return candidate ``number`` of each prompt (N, S, S, 3), and the seconds per image; computed once."""
        path = self._path({"draw": number, "call": call})
        if not path.exists():
            steps = self.pipeline.config["num_inference_steps"]
            noise = self.asked.noise(self.pipeline.backbone, number + 1, steps).unflatten(0, (-1, number + 1))[
                :, number
            ]
            started = time.perf_counter()
            with tqdm(desc=f"{self.source.name} {call} {number}", unit="step", mininterval=2, leave=False) as bar:

                def on_progress(step: int, steps: int) -> None:
                    bar.total = steps
                    bar.update(step - bar.n)

                texts = torch.from_numpy(self.asked.texts)
                output = self.pipeline(texts, latents=noise, candidates=1, on_progress=on_progress, **call)
            pixels = np.stack([np.asarray(image) for image in output.images])
            seconds = (time.perf_counter() - started) / len(pixels)
            write_whole(path, lambda file: np.savez(file, pixels=pixels, seconds=seconds))
        with np.load(path) as stored:
            return stored["pixels"], float(stored["seconds"])

    def _targets(self, call: dict[str, Any]) -> Embeddings:
        """Return the embeddings (N, D) that the pipeline compares candidates with."""
        slot = self._condition(call).query
        return self.asked.texts if slot is None else slot.numpy()

    def _condition(self, call: dict[str, Any]) -> Condition:
        neighbours = call.get("neighbours", self.pipeline.config["neighbours"])
        return self.pipeline.condition(torch.from_numpy(self.asked.texts), neighbours, call.get("query"))

    def _path(self, settings: dict[str, Any]) -> Path:
        settings = settings | {
            "weights": weights_digest(BUNDLED_GENERATOR),
            "defaults": {name: self.pipeline.config[name] for name in DEFAULTS},
            "database": self.source.version,
            "asked": self.asked.digest(),
            "device": self.pipeline.device.type,
            "seed": SEED,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return BENCH / "prompts" / f"{self.source.name}-{digest}.npz"
