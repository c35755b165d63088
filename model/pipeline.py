"""KNNDiffusionPipeline: a diffusers pipeline with a database in it.

Legend: ``P`` prompts, ``M`` pictures a prompt, ``K`` neighbours, ``D`` embedding width, ``C S S`` picture.

    prompt --encoder--> query (D) --database--> neighbours (K, D) --tokens--> denoiser, guided, σ 1 to 0 --> picture

The database is no part of what is saved: any one of the same encoder can be plugged in, and swapped while the pipeline
runs. A call works with the database it started with.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from diffusers.utils import BaseOutput
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from model.clip import Encoder, EncoderIdentity, encoder_for
from model.diffusion.conditioning import condition_tokens
from model.diffusion.continuous import Denoiser, Prediction
from model.diffusion.guidance import guided
from model.errors import ModelError
from model.networks.dit import as_denoiser
from model.retrieval.database import Database, Hits

QuerySlot = Literal["text", "mean", "none"]
"""What stands in the query's slot: the prompt's embedding, the mean of its neighbours, or nothing."""

EMBEDDED = "sticker-generator"
"""The small generator that ships with this package; any other name is a folder."""

BATCH = 64
_EMBEDDED_FOLDER = Path(__file__).parent / "pretrained" / "sticker-generator" / "pipeline"


@dataclasses.dataclass
class KNNDiffusionOutput(BaseOutput):
    """Pictures, prompt after prompt, and the neighbours they were drawn from (None without retrieval)."""

    images: list[Image.Image]
    hits: Hits | None


class KNNDiffusionPipeline(DiffusionPipeline):
    """Text or embedding to pictures, through the neighbours in ``database``."""

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        encoder_identity: dict[str, Any] | None = None,
        neighbours: int = 10,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 25,
        query: str = "text",
        prediction: str = "velocity",
    ) -> None:
        """Join the parts. ``neighbours`` … ``query`` are the defaults that a call may override.

        Raises ``ModelError`` without an ``encoder_identity`` (the fields of :class:`model.clip.EncoderIdentity`); it
        has a default only because diffusers takes an argument without one for a module.
        """
        super().__init__()
        if encoder_identity is None:
            raise ModelError("encoder_identity is missing: a generator is of use in its encoder's space alone")
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            encoder_identity=dict(encoder_identity),
            neighbours=neighbours,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            query=query,
            prediction=prediction,
        )
        self._identity = EncoderIdentity(**encoder_identity)
        self._encoder: Encoder | None = None
        self._database: Database | None = None

    @classmethod
    def open(cls, folder: Path | str, database: Database | None = None) -> Self:
        """Load a saved pipeline and plug a database in. Raises ``ModelError`` when the folder holds none."""
        bars = diffusers_logging.is_progress_bar_enabled()
        diffusers_logging.disable_progress_bar()  # two small files are no long work
        try:
            pipeline: Self = cls.from_pretrained(str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=False)
        except Exception as error:  # diffusers and safetensors raise OSError, ValueError and types of their own
            raise ModelError(
                f"{folder} holds no usable generator ({error}); train it again, or pull it anew"
            ) from error
        finally:
            if bars:
                diffusers_logging.enable_progress_bar()
        if database is not None:
            pipeline.swap_database(database)
        return pipeline

    @property
    def database(self) -> Database:
        """The database in use. Raises ``ModelError`` when none is plugged in."""
        if self._database is None:
            raise ModelError("this pipeline has no database yet; give it one with swap_database")
        return self._database

    def swap_database(self, database: Database) -> None:
        """Draw from ``database`` from the next call on. Raises ``ModelError`` when another encoder made it."""
        if not database.encoder.same_space(self._identity):
            raise ModelError(
                f"database {database.name} was made by {database.encoder}, this generator was trained with "
                f"{self._identity}; rebuild the database with that encoder"
            )
        self._database = database

    @property
    def identity(self) -> EncoderIdentity:
        """The encoder that the network was trained with."""
        return self._identity

    @property
    def encoder(self) -> Encoder:
        """The encoder of the prompts, loaded when first needed and checked against the one trained with."""
        if self._encoder is None:
            self._encoder = encoder_for(self._identity, device=self.device)
        return self._encoder

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        neighbours: int | None = None,
        query: QuerySlot | None = None,
        retrieve: bool = True,
        callback: Callable[[int, int], None] | None = None,
    ) -> KNNDiffusionOutput:
        """Draw pictures.

        Args:
            prompts: a text, texts, or embeddings (P, D) of the encoder (of pictures, say).
            num_images_per_prompt: M, drawn from different noise.
            guidance_scale: 1 follows the condition as trained; above, more strongly.
            num_inference_steps: Euler steps from noise to picture.
            generator: source of the noise; the same seed gives the same pictures whatever the batch.
            neighbours: K, free to differ from training.
            query: what stands in the query's slot.
            retrieve: False hides the neighbours: the ablation without retrieval.
            callback: called with (step, steps) of all batches together.

        Returns:
            P·M pictures, prompt after prompt, and the hits of each prompt.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        k = self.config.neighbours if neighbours is None else neighbours
        if not math.isfinite(scale):
            raise ModelError(f"guidance_scale is {scale}; give a number")
        if min(num_images_per_prompt, steps, k) < 1:
            raise ModelError("num_images_per_prompt, num_inference_steps and neighbours must be at least 1")
        embeddings = self._embed(prompts)
        hits = self.database.search(embeddings.numpy(), k) if retrieve else None
        tokens = self._condition(embeddings, hits, k, query or (self.config.query if retrieve else "text"))
        tokens = tokens.repeat_interleave(num_images_per_prompt, dim=0)
        noise = self._noise(len(tokens), generator)
        denoiser = guided(as_denoiser(self.transformer.eval(), self.config.prediction), scale)
        starts = range(0, len(tokens), BATCH)
        pictures = []
        for number, start in enumerate(starts):
            told = _offset(callback, number * steps, len(starts) * steps)
            batch = slice(start, start + BATCH)
            pictures.append(self._integrate(denoiser, noise[batch], tokens[batch], steps, told))
        return KNNDiffusionOutput(images=to_images(torch.cat(pictures)), hits=hits)

    def _embed(self, prompts: str | Sequence[str] | Tensor) -> Tensor:
        if isinstance(prompts, Tensor):
            if prompts.ndim != 2 or not len(prompts) or not prompts.isfinite().all():
                raise ModelError(f"embeddings {tuple(prompts.shape)} must be finite rows (P, D), at least one")
            return F.normalize(prompts.float().cpu(), dim=-1)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(text.strip() for text in texts):
            raise ModelError("a prompt is empty; write what the picture should show")
        return self.encoder.embed_texts(texts)

    def _condition(self, embeddings: Tensor, hits: Hits | None, k: int, query: str) -> Tensor:
        dimension, batch = self._identity.dimension, len(embeddings)
        # Without retrieval all K neighbours are hidden: the input that training has shown for it.
        found = torch.zeros(batch, k, dimension) if hits is None else torch.from_numpy(hits.embeddings)
        slot: Tensor | None
        match query:
            case "text":
                slot = embeddings
            case "mean" if hits is not None:
                slot = F.normalize(found.mean(dim=1), dim=-1)
            case "none":
                slot = None
            case _:
                raise ModelError(f"query={query!r}: write 'text', 'none', or, with retrieval, 'mean'")
        return condition_tokens(slot, found, dimension=dimension, batch=batch)

    def _noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Noise drawn picture by picture on the CPU, so that neither the batch nor the device changes it."""
        side = self.transformer.config.sample_size
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        return torch.stack([torch.randn(3, side, side, generator=generator) for _ in range(count)])

    def _integrate(
        self, denoiser: Denoiser, noise: Tensor, condition: Tensor, steps: int, told: Callable[[int], None]
    ) -> Tensor:
        """Euler from σ = 1 to 0 over the scheduler's (shifted) levels: (B, 3, S, S) in [−1, 1] on the CPU."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        picture, condition = noise.to(self.device), condition.to(self.device)
        for number, (timestep, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=False)):
            velocity = denoiser(picture, sigma.expand(len(picture)).to(self.device), condition)
            picture = scheduler.step(velocity, timestep, picture, return_dict=False)[0]
            told(number + 1)
        return picture.clamp(-1, 1).float().cpu()


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, S, S) in [−1, 1] to RGB pictures."""
    pixels = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def new_pipeline(
    transformer: PixArtTransformer2DModel,
    encoder: EncoderIdentity,
    *,
    prediction: Prediction,
    neighbours: int,
    guidance_scale: float = 2.0,
) -> KNNDiffusionPipeline:
    """A pipeline around a freshly trained network; shift 2 spends the steps where 32 to 64 px need them."""
    return KNNDiffusionPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        encoder_identity=dataclasses.asdict(encoder),
        neighbours=neighbours,
        guidance_scale=guidance_scale,
        prediction=prediction,
    )


def pretrained_folder(name: str) -> Path:
    """The folder of a saved pipeline: ``sticker-generator`` is the embedded one."""
    return _EMBEDDED_FOLDER if name == EMBEDDED else Path(name)


def weights_digest(name: str) -> str:
    """Hex sha256 over the weight files of a saved pipeline. Raises ``ModelError`` when there are none."""
    digest = hashlib.sha256()
    files = sorted(pretrained_folder(name).rglob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{name} holds no weights (*.safetensors); name a folder that save_pretrained wrote, or {EMBEDDED}"
        )
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _offset(callback: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int], None]:
    def told(step: int) -> None:
        if callback is not None:
            callback(before + step, total)

    return told
