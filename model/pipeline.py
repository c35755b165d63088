"""KNNDiffusionPipeline: a diffusers pipeline with a database in it.

Legend: ``P`` prompts, ``M`` pictures a prompt, ``K`` neighbours, ``D`` embedding width, ``S`` side.

    prompt --encoder--> query (D) --database--> neighbours (K, D) --tokens--> network, guided --> picture

The network is a transformer or a U-Net over pixels or latents (flow matching), or a transformer over codes
(VQ-Diffusion); the saved folder says which. The database is no part of what is saved: any one of the same encoder can
be plugged in, and swapped while the pipeline runs. A call works with the database it started with.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn

from model.diffusion.conditioning import MARKER_CHANNELS, condition_tokens, tokens_between
from model.diffusion.flow_matching import Denoiser, Prediction
from model.diffusion.guidance import WHOLE
from model.diffusion.solver import Told, is_count, new_scheduler
from model.editing.edit import EditConfig, edit
from model.encoder.clip import Encoder, encoder_for
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.generation.sampling import Asked, draw
from model.images import on_white
from model.networks.compilation import compile_in_place
from model.networks.denoiser import as_denoiser
from model.networks.editor import is_editor, with_reference
from model.networks.fused_attention import use_fused_attention
from model.networks.vq_transformer import VQTransformer
from model.retrieval.database import Hits, Searchable
from model.saved_generator import check_weights
from model.training.data import to_pixels

logger = logging.getLogger(__name__)

QuerySlot = Literal["text", "mean", "both", "none"]
"""What stands in the query's slot: the prompt's embedding, its neighbours' mean, the mean of the two, or nothing."""

Prompt = str | Image.Image
Prompts = Prompt | Sequence[Prompt] | Tensor
"""Texts and pictures, mixed as one likes, or embeddings (P, D) of the encoder."""


@dataclasses.dataclass
class KNNDiffusionOutput(BaseOutput):
    """Pictures, prompt after prompt, and the prompts' neighbours that they were drawn from (None without retrieval)."""

    images: list[Image.Image]
    hits: Hits | None


class Conditioned(NamedTuple):
    """What the network is told of P prompts, and where it comes from.

    Attributes:
        tokens: (P, 1 + K, D + 1), hidden neighbours among them where training showed more.
        query: (P, D) unit rows, what stands in the query's slot; None: nothing.
        hits: the neighbours; None without retrieval.
    """

    tokens: Tensor
    query: Tensor | None
    hits: Hits | None


class KNNDiffusionPipeline(DiffusionPipeline):
    """Texts, pictures or embeddings to pictures, through the neighbours in ``database``."""

    _optional_components = ["scheduler", "vae"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        transformer: PixArtTransformer2DModel | UNet2DConditionModel | VQTransformer,
        scheduler: UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler | None = None,
        vae: AutoencoderKL | VQModel | None = None,
        encoder_identity: dict[str, Any] | None = None,
        neighbours: int = 10,
        trained_neighbours: int | None = None,
        candidates: int = 1,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, ...] | list[float] = WHOLE,
        num_inference_steps: int = 25,
        query: str = "text",
        prediction: str = "velocity",
        truncation: float = 0.86,
    ) -> None:
        """Join the parts. ``neighbours`` … ``truncation`` are the defaults; a call may override most.

        Args:
            transformer: the network: velocities of pixels or latents, or logits of codes.
            scheduler: of the continuous networks; the discrete one needs none.
            vae: what the network's latents or codes belong to; None where it works on pixels.
            encoder_identity: the fields of :class:`model.encoder.clip.EncoderIdentity`.
            neighbours: K.
            trained_neighbours: the most that training has shown at once; None: K.
            candidates: pictures drawn for each that is returned.
            guidance_scale: 1 follows the condition as trained.
            guidance_interval: the noise levels σ at which guidance acts (continuous networks).
            num_inference_steps: steps from noise to picture.
            query: what stands in the query's slot.
            prediction: what a continuous network answers with.
            truncation: probability mass kept of every code (discrete network).

        Raises:
            ModelError: ``encoder_identity`` is missing (it has a default only because diffusers takes an argument
                without one for a module), or a part that the network needs is, or they do not fit, or no call could
                use a default.
        """
        super().__init__()
        if encoder_identity is None:
            raise ModelError("encoder_identity is missing: a generator is of use in its encoder's space alone")
        if isinstance(transformer, VQTransformer) and vae is None:
            raise ModelError("a network over codes needs the vae (a VQModel) that the codes belong to")
        if not isinstance(transformer, VQTransformer) and scheduler is None:
            raise ModelError(
                "a continuous network needs a scheduler; give that of model.diffusion.solver.new_scheduler"
            )
        use_fused_attention(transformer)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            encoder_identity=dict(encoder_identity),
            neighbours=neighbours,
            trained_neighbours=trained_neighbours or neighbours,
            candidates=candidates,
            guidance_scale=guidance_scale,
            guidance_interval=list(guidance_interval),
            num_inference_steps=num_inference_steps,
            query=query,
            prediction=prediction,
            truncation=truncation,
        )
        _check_defaults(self.config)
        self._identity = EncoderIdentity(**encoder_identity)
        if _condition_width(transformer) != self._identity.dimension + MARKER_CHANNELS:
            raise ModelError(
                f"the network takes embeddings of {_condition_width(transformer) - MARKER_CHANNELS} numbers, "
                f"{self._identity} makes others; name the encoder that the network was trained with"
            )
        self._encoder: Encoder | None = None
        self._database: Searchable | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """As diffusers does, which takes weights that are not there for a warning.

        Raises ``ModelError`` for a part whose weights are of another config, or no finite numbers.
        """
        pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **options)
        for name, part in pipeline.components.items():
            if isinstance(part, ModelMixin) and name not in options:
                check_weights(Path(part.config._name_or_path), part)
        return pipeline

    @classmethod
    def open(cls, folder: Path | str, database: Searchable | None = None) -> Self:
        """Load a saved pipeline and plug a database in.

        Raises ``ModelError`` when the folder holds none, or holds weights of another config.
        """
        bars = diffusers_logging.is_progress_bar_enabled()
        diffusers_logging.disable_progress_bar()  # a few small files are no long work
        try:
            pipeline: Self = cls.from_pretrained(
                str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
            )
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
    def database(self) -> Searchable:
        """The database in use. Raises ``ModelError`` when none is plugged in."""
        if self._database is None:
            raise ModelError("this pipeline has no database yet; give it one with swap_database")
        return self._database

    def swap_database(self, database: Searchable) -> None:
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

    @property
    def side(self) -> int:
        """Width and height of the pictures it draws, in px."""
        if isinstance(self.transformer, VQTransformer):
            return int(self.vae.config.sample_size)
        scale = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return int(self.transformer.config.sample_size) * scale

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """As diffusers does, but for the paths that parts were loaded from, which they forget here."""
        for part in (self, *self.components.values()):
            if isinstance(kept := getattr(part, "_internal_dict", None), dict):
                part._internal_dict = FrozenDict({key: kept[key] for key in kept if key != "_name_or_path"})
        super().save_pretrained(save_directory, *arguments, **options)

    def compile(self) -> None:
        """Compile the network where it is, for drawing many pictures on a GPU: after ``to``, before the first call.

        A transformer takes about half a minute more at its first call, and again where another batch size or number of
        neighbours comes (guidance in an interval has two batch sizes in one call). A U-Net takes minutes.
        """
        compile_in_place(self.transformer)

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Prompts,
        *,
        negative_prompts: Prompts | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        neighbours: int | None = None,
        candidates: int | None = None,
        query: QuerySlot | None = None,
        retrieve: bool = True,
        shared_noise: bool = False,
        between: int | None = None,
        callback: Told | None = None,
    ) -> KNNDiffusionOutput:
        """Draw pictures.

        Args:
            prompts: a text or a picture, several of them, or embeddings (P, D) of the encoder.
            negative_prompts: what to keep away from, one for all or one for each; needs a guidance above 1.
            num_images_per_prompt: M, drawn from different noise.
            guidance_scale: 1 follows the condition as trained; above, more strongly.
            num_inference_steps: steps from noise to picture.
            generator: source of the noise, on the CPU; the same seed gives the same pictures whatever the batch.
            neighbours: K, free to differ from training.
            candidates: pictures drawn for each that is returned, at so many times the cost. The one whose embedding is
                closest to what stands in the query's slot (to the prompt's, where nothing does) is kept.
            query: what stands in the query's slot.
            retrieve: False hides the neighbours: the ablation without retrieval.
            shared_noise: whether all pictures start from one noise, so that only the prompts tell them apart; there is
                no choice among candidates then.
            between: pictures on the way from the first of two prompts to the second, ends included, in place of one of
                each, and from one noise.
            callback: called with (step, steps) of all batches together.

        Returns:
            P·M pictures, prompt after prompt (``between``·M, step after step), and the hits of each prompt.

        Raises:
            ModelError: a prompt is empty, there are not two to go between, a number or the generator makes no sense,
                memory is out, or the weights draw no finite numbers.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        k = self.config.neighbours if neighbours is None else neighbours
        choice = self.config.candidates if candidates is None else candidates
        if not math.isfinite(scale):
            raise ModelError(f"guidance_scale is {scale}; give a number")
        if negative_prompts is not None and scale <= 1:
            raise ModelError(f"negative_prompts need a guidance_scale above 1 to act, it is {scale}; raise it")
        if not all(map(is_count, (num_images_per_prompt, steps, k, choice))):
            counts = "num_images_per_prompt, num_inference_steps, neighbours and candidates"
            raise ModelError(f"{counts} must be at least 1, in whole numbers")
        shared_noise = shared_noise or between is not None
        choice = 1 if shared_noise else choice
        each = num_images_per_prompt * choice
        embeddings = self.embed(prompts)
        database = self.database if retrieve else None  # another may be swapped in meanwhile
        condition = self.condition(embeddings, k, query, retrieve, database=database)
        tokens = condition.tokens if between is None else _way(condition.tokens, between)
        negative = None
        if negative_prompts is not None:
            against = _each(self.embed(negative_prompts), len(tokens))
            negative = self.condition(against, k, query, retrieve, database=database).tokens.repeat_interleave(
                each, dim=0
            )
        target = embeddings if condition.query is None else condition.query
        asked = Asked(
            tokens=tokens.repeat_interleave(each, dim=0),
            targets=target.repeat_interleave(num_images_per_prompt, dim=0),
            candidates=choice,
            negative=negative,
            guidance_scale=scale,
            steps=steps,
            generator=generator,
            shared_noise=shared_noise,
            told=callback,
        )
        return KNNDiffusionOutput(images=to_images(draw(self, asked)), hits=condition.hits)

    def edit(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompts: Prompts,
        *,
        strength: float = 1.0,
        method: Literal["local", "restore", "sdedit"] = "local",
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        neighbours: int | None = None,
        retrieve: bool = True,
        **options: Any,
    ) -> list[Image.Image]:
        """Edit pictures by texts, without a mask: what disagrees with the text is redrawn, the rest stays.

        See :func:`model.editing.edit` for arguments and errors; ``options`` (guidance_scale, candidates, …) are
        those of :class:`model.editing.edit.EditConfig`, whose defaults were measured.
        """
        if num_inference_steps is not None:
            options["steps"] = num_inference_steps
        config = EditConfig(method=method, strength=strength, **options)
        return edit(self, images, prompts, config, generator=generator, neighbours=neighbours, retrieve=retrieve)

    def interpolate(self, first: Prompt, second: Prompt, count: int = 8, **options: Any) -> KNNDiffusionOutput:
        """``count`` pictures on the way from one prompt to the other, from one noise; ``options`` as of a call.

        The neighbours of one turn into those of the other with the query, rank by rank: were they searched anew on the
        way, pictures would stay the same and then jump. The hits are those of the ends.
        """
        output: KNNDiffusionOutput = self([first, second], between=count, **options)
        return output

    def embed(self, prompts: Prompts) -> Tensor:
        """Prompts as unit rows (P, D) on the CPU. Raises ``ModelError`` for an empty one, words or picture."""
        if isinstance(prompts, Tensor):
            if prompts.ndim != 2 or not len(prompts) or not prompts.isfinite().all():
                raise ModelError(f"embeddings {tuple(prompts.shape)} must be finite rows (P, D), at least one")
            return F.normalize(prompts.float().cpu(), dim=-1)
        kinds = "give str, PIL images or embeddings (P, D)"
        if not isinstance(prompts, Prompt | Iterable):
            raise ModelError(f"prompts are {type(prompts).__name__}; {kinds}")
        listed = [prompts] if isinstance(prompts, Prompt) else list(prompts)
        if not listed or any(isinstance(prompt, str) and not prompt.strip() for prompt in listed):
            raise ModelError("a prompt is empty; write what the picture should show")
        rows = torch.empty(len(listed), self._identity.dimension)
        texts = {number: prompt for number, prompt in enumerate(listed) if isinstance(prompt, str)}
        pictures = {number: on_white(prompt) for number, prompt in enumerate(listed) if isinstance(prompt, Image.Image)}
        if len(texts) + len(pictures) < len(listed):
            raise ModelError(f"a prompt is neither text nor picture; {kinds}")
        if texts:
            rows[list(texts)] = self.encoder.embed_texts(list(texts.values()))
        if pictures:
            rows[list(pictures)] = self.encoder.embed_images(list(pictures.values()))
        return rows

    def condition(
        self,
        embeddings: Tensor,
        k: int,
        query: str | None = None,
        retrieve: bool = True,
        *,
        database: Searchable | None = None,
    ) -> Conditioned:
        """What the network is told of embeddings (P, D), by ``database``, the one plugged in where None.

        Fewer neighbours than training showed, for ``k`` or the database is small, are filled up with hidden ones.
        """
        dimension, batch, hits = self._identity.dimension, len(embeddings), None
        if retrieve:
            database = self.database if database is None else database
            hits = database.search(embeddings.numpy(), k)
            if k > len(database):
                logger.warning("the database holds %d images, %d neighbours were asked for", len(database), k)
        # Without retrieval all K neighbours are hidden: the input that training has shown for it.
        found = torch.zeros(batch, k, dimension) if hits is None else torch.from_numpy(hits.embeddings)
        mean = F.normalize(found.mean(dim=1), dim=-1)
        slot: Tensor | None
        match query or (self.config.query if retrieve else "text"):
            case "text":
                slot = embeddings
            case "mean" if hits is not None:
                slot = mean
            case "both" if hits is not None:
                slot = F.normalize(embeddings + mean, dim=-1)
            case "none":
                slot = None
            case other:
                raise ModelError(f"query={other!r}: write 'text', 'none', or, with retrieval, 'mean' or 'both'")
        found = F.pad(found, (0, 0, 0, max(0, self.config.trained_neighbours - found.shape[1])))
        return Conditioned(condition_tokens(slot, found, dimension=dimension, batch=batch), slot, hits)

    def denoiser(self) -> Denoiser:
        """The continuous network as a function of (x_σ, σ, tokens) to a velocity; an editor sees no picture to edit."""
        denoiser = as_denoiser(self.transformer.eval(), self.config.prediction)
        return with_reference(denoiser, None) if is_editor(self.transformer) else denoiser


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, S, S) in [−1, 1] to RGB pictures."""
    return [Image.fromarray(picture) for picture in to_pixels(pictures)]


def new_pipeline(
    network: PixArtTransformer2DModel | UNet2DConditionModel | VQTransformer,
    encoder: EncoderIdentity,
    *,
    prediction: Prediction = "velocity",
    vae: AutoencoderKL | VQModel | None = None,
    scheduler: UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler | None = None,
    **defaults: Any,
) -> KNNDiffusionPipeline:
    """A pipeline around a trained network, drawn with ``scheduler``, or :func:`model.diffusion.solver.new_scheduler`.

    ``defaults`` are those of :class:`KNNDiffusionPipeline`: neighbours, guidance_scale, query, ….
    """
    return KNNDiffusionPipeline(
        transformer=network,
        scheduler=None if isinstance(network, VQTransformer) else scheduler or new_scheduler(),
        vae=vae,
        encoder_identity=dataclasses.asdict(encoder),
        prediction=prediction,
        **defaults,
    )


def _check_defaults(config: Any) -> None:
    """Raise ``ModelError`` for defaults that no call could use."""
    counts = {name: config[name] for name in ("neighbours", "trained_neighbours", "candidates", "num_inference_steps")}
    for name, value in counts.items():
        if not is_count(value):
            raise ModelError(f"{name} is {value!r}; give a whole number, at least 1")
    for name, known in (("query", get_args(QuerySlot)), ("prediction", get_args(Prediction))):
        if config[name] not in known:
            raise ModelError(f"{name} is {config[name]!r}; write one of {', '.join(known)}")
    levels, scale, mass = config.guidance_interval, config.guidance_scale, config.truncation
    if len(levels) != 2 or not all(map(math.isfinite, levels)) or not levels[0] < levels[1]:
        raise ModelError(f"guidance_interval is {levels}; give two noise levels, the lower first")
    if not math.isfinite(scale):
        raise ModelError(f"guidance_scale is {scale}; give a number")
    if not 0 < mass <= 1:
        raise ModelError(f"truncation is {mass}; give a share above 0, and at most 1, which keeps all")


def _condition_width(network: nn.Module) -> int:
    """E, the channels of the condition tokens that a network takes."""
    config: Any = network.config
    if isinstance(network, VQTransformer):
        return int(config.condition_channels)
    return int(config.get("caption_channels") or config.cross_attention_dim)  # a transformer projects its captions


def _way(tokens: Tensor, count: int) -> Tensor:
    if len(tokens) != 2:
        raise ModelError(f"a way goes from one prompt to another; {len(tokens)} were given")
    if not is_count(count) or count < 2:
        raise ModelError("an interpolation has two ends; ask for at least 2 pictures")
    return tokens_between(tokens, count)


def _each(embeddings: Tensor, count: int) -> Tensor:
    if len(embeddings) not in (1, count):
        raise ModelError(f"{len(embeddings)} negative prompts for {count} prompts; give one for all, or one for each")
    return embeddings.expand(count, -1)
