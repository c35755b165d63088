"""What a training run starts with: the network, the autoencoder, the objective, and the checks that they fit."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

from diffusers import PixArtTransformer2DModel, VQModel

from infra import uris
from infra.errors import EncoderMismatchError, InputError
from model.diffusion.conditioning import ConditioningConfig
from model.diffusion.flow_matching import Prediction
from model.diffusion.vq_diffusion import Transitions
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.networks.build import AnyNetwork, NetworkConfig, build_network, config_of_network
from model.networks.dit import TransformerConfig
from model.networks.editor import is_editor, widen_input
from model.networks.latents import Autoencoder
from model.networks.vq_transformer import VQTransformerConfig
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import check_weights, pretrained_folder
from model.training.interfaces import Objective, TrainingConfig
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.restoration import Restoration, RestorationConfig
from model.training.objectives.vq_diffusion import MaskAndReplace


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The network, what it is told, how long it learns, and on how many workers."""

    network: NetworkConfig | None = None  # None: that of start_from, or a small transformer
    autoencoder: str | None = None  # folder of a diffusers AutoencoderKL or VQModel; None: pixels
    image_size: int | None = None  # px; None: what the network and its autoencoder work on
    editing: bool = False  # learn to restore pictures too: a transformer over pixels
    restoration: RestorationConfig = dataclasses.field(default_factory=lambda: RestorationConfig(drop_reference=0.7))
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    workers: int = 1
    cpus_per_worker: int = 2
    use_gpu: bool = False
    window_bytes: int = 2 << 30  # of pictures shuffled together, over all workers; a larger set has two in memory
    guidance_scale: float | None = None  # the pipeline's default; None: that of start_from, or 2
    start_from: str | None = None  # a pipeline folder or "sticker-generator" to fine-tune; None: random weights

    def __post_init__(self) -> None:
        """Refuse a run without workers or memory, what could not be drawn, and editing where it cannot be learned."""
        uris.hide_fields(self, "autoencoder", "start_from")
        if self.workers < 1 or self.cpus_per_worker < 1:
            raise ValueError("workers and cpus_per_worker must be at least 1")
        if self.window_bytes < 1:
            raise ValueError("window_bytes must be at least 1")
        if isinstance(self.network, VQTransformerConfig) and not (self.autoencoder or self.start_from):
            raise ValueError("a network over codes needs the folder of a VQModel as autoencoder")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; give a number")
        if self.editing and (self.autoencoder or not isinstance(self.network, TransformerConfig | None)):
            raise ValueError("editing is learned by a transformer over pixels; leave autoencoder out")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """A network ready to train, and what belongs to it."""

    network: AnyNetwork
    size: NetworkConfig
    autoencoder: Autoencoder | None
    scheduler: Any  # of start_from, for it is drawn as it was; None: a new one
    image_size: int  # px
    defaults: dict[str, Any]  # of the pipeline that it becomes

    @property
    def prediction(self) -> Prediction:
        """What the network answers with; of no meaning over codes."""
        return "velocity" if isinstance(self.size, VQTransformerConfig) else self.size.prediction


def build_setup(config: TrainConfig, encoder: EncoderIdentity) -> TrainingSetup:
    """Build or load the network of ``config`` for pictures embedded by ``encoder``.

    Raises:
        EncoderMismatchError: ``start_from`` lives in another encoder's space.
        InputError: ``start_from``, ``network``, ``autoencoder`` and ``image_size`` do not fit each other.
    """
    shown = config.conditioning.neighbours
    defaults: dict[str, Any] = {"neighbours": shown, "trained_neighbours": shown, "guidance_scale": 2.0}
    autoencoder = None if config.autoencoder is None else load_autoencoder(config.autoencoder)
    scheduler = None
    if config.start_from is None:
        size = config.network or TransformerConfig()
        network = build_network(size, embedding_dimension=encoder.dimension, seed=config.training.seed)
    else:
        pipeline = load_initial_pipeline(config.start_from, encoder)
        network = pipeline.transformer.float().requires_grad_(True)
        size = config_of_network(network, pipeline.config.prediction)
        if config.network not in (None, size):
            raise InputError(
                f"{config.start_from} is {size}, not {config.network}; leave network out to take its own size"
            )
        autoencoder, scheduler = autoencoder or pipeline.vae, pipeline.scheduler
        kept = ("candidates", "guidance_scale", "guidance_interval", "num_inference_steps", "query", "truncation")
        defaults |= {name: pipeline.config[name] for name in kept}
        defaults["neighbours"] = min(shown, pipeline.config.neighbours)
    if config.editing and not is_editor(network):
        network = _widened(network, autoencoder)
    if config.guidance_scale is not None:
        defaults["guidance_scale"] = config.guidance_scale
    side = image_side(size, autoencoder)
    if config.image_size not in (None, side):
        raise InputError(
            f"image_size is {config.image_size} px, but the network works on pictures of {side} px; "
            "leave image_size out, or choose a network of another size"
        )
    return TrainingSetup(
        network=network,
        size=size,
        autoencoder=autoencoder,
        scheduler=scheduler,
        image_size=side,
        defaults=defaults,
    )


def objective_of(config: TrainConfig, setup: TrainingSetup) -> Objective:
    """What the network of ``setup`` learns by."""
    if isinstance(setup.size, VQTransformerConfig):
        return MaskAndReplace(Transitions(codes=setup.size.codes, timesteps=setup.size.timesteps), config.conditioning)
    if config.editing:
        return Restoration(config.conditioning, config.restoration, prediction=setup.prediction)
    return FlowMatching(config.conditioning, setup.prediction)


def load_initial_pipeline(start_from: str, encoder: EncoderIdentity) -> KNNDiffusionPipeline:
    """The pipeline to start from. Raises ``EncoderMismatchError`` when its encoder is another."""
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(start_from))
    if not pipeline.identity.same_space(encoder):
        raise EncoderMismatchError(
            f"{start_from} was trained with {pipeline.identity}, these pictures were embedded by {encoder}; "
            "embed with its encoder, or start from random weights"
        )
    return pipeline


def load_autoencoder(folder: str) -> Autoencoder:
    """The AutoencoderKL or VQModel in ``folder``, frozen. Raises ``InputError`` when there is neither, or not whole."""
    classes = {kind.__name__: kind for kind in get_args(Autoencoder)}
    try:
        name = json.loads((Path(folder) / "config.json").read_text())["_class_name"]
        loaded: Autoencoder = classes[name].from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True)
        check_weights(Path(folder), loaded)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ModelError) as error:
        raise InputError(
            f"{folder} holds no usable autoencoder ({error}); name a folder that save_pretrained of "
            f"{' or '.join(classes)} wrote"
        ) from error
    return loaded.eval().requires_grad_(False)


def image_side(size: NetworkConfig, autoencoder: Autoencoder | None) -> int:
    """The side in px of the pictures that a network sees through its autoencoder. Raises ``InputError``."""
    if autoencoder is None:
        if isinstance(size, VQTransformerConfig):
            raise InputError("a network over codes needs the folder of a VQModel as autoencoder")
        if size.channels != 3:
            raise InputError(f"the network takes {size.channels} channels, a picture has 3; name its autoencoder")
        return size.image_size
    held: Any = autoencoder.config
    scale: int = 2 ** (len(held.block_out_channels) - 1)
    if not isinstance(size, VQTransformerConfig):
        channels = _latent_channels(autoencoder)
        if size.channels != channels:
            raise InputError(
                f"the network takes {size.channels} channels, the autoencoder's latents have {channels}; set channels "
                "to that"
            )
        return size.image_size * scale
    side = math.isqrt(size.tokens) * scale
    if not isinstance(autoencoder, VQModel) or held.num_vq_embeddings != size.codes or held.sample_size != side:
        given = (
            f"{held.num_vq_embeddings} codes at {held.sample_size} px"
            if isinstance(autoencoder, VQModel)
            else "no codes at all"
        )
        raise InputError(
            f"the network's {size.codes} codes and {size.tokens} tokens need a VQModel of {size.codes} codes at {side} "
            f"px, the autoencoder has {given}; choose codes and tokens after it"
        )
    return side


def _latent_channels(autoencoder: Autoencoder) -> int:
    """C of the latents: a VQModel's have the width of its codes, not of what is in front of the codebook."""
    held: Any = autoencoder.config
    width = held.vq_embed_dim if isinstance(autoencoder, VQModel) else None
    return int(width or held.latent_channels)


def _widened(network: AnyNetwork, autoencoder: Autoencoder | None) -> AnyNetwork:
    if autoencoder is not None or not isinstance(network, PixArtTransformer2DModel):
        raise InputError("editing is learned by a transformer over pixels; start from one, or leave editing out")
    try:
        return widen_input(network)
    except ModelError as error:
        raise InputError(str(error)) from error
