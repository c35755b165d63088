"""Training setup: build or load the network, autoencoder and objective, and check that they fit together."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

from diffusers import PixArtTransformer2DModel, VQModel

from infra.errors import EncoderMismatchError, InputError
from model.configs import (
    NetworkConfig,
    Prediction,
    TransformerConfig,
    VQTransformerConfig,
)
from model.diffusion.vq_diffusion import Transitions
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.networks.build import AnyNetwork, build_network, config_of_network
from model.networks.editor import is_editor, widen_input
from model.networks.image_tokens import add_image_tokens, takes_images
from model.networks.latents import Autoencoder
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import check_weights, pretrained_folder
from model.training.interfaces import Objective
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.restoration import Restoration
from model.training.objectives.vq_diffusion import MaskAndReplace
from tasks.train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """Network to train, with the autoencoder, scheduler and defaults of its pipeline."""

    network: AnyNetwork
    network_config: NetworkConfig
    autoencoder: Autoencoder | None
    scheduler: Any  # of start_from, to sample in the same way; None: a new one
    image_size: int  # px
    defaults: dict[str, Any]  # of the pipeline that is saved after training

    @property
    def prediction(self) -> Prediction:
        """Type of the network's output; unused for networks over codes."""
        return "velocity" if isinstance(self.network_config, VQTransformerConfig) else self.network_config.prediction


def build_setup(config: TrainConfig, encoder: EncoderIdentity) -> TrainingSetup:
    """Build or load the network of ``config`` for images embedded by ``encoder``.

    Raises:
        EncoderMismatchError: ``start_from`` was trained with another encoder.
        InputError: ``start_from``, ``network``, ``autoencoder`` and ``image_size`` do not fit each other.
    """
    trained_neighbours = config.conditioning.neighbours
    defaults: dict[str, Any] = {
        "neighbours": trained_neighbours,
        "trained_neighbours": trained_neighbours,
        "guidance_scale": 2.0,
    }
    autoencoder = None if config.autoencoder is None else load_autoencoder(config.autoencoder)
    scheduler = None
    if config.start_from is None:
        network_config = config.network or TransformerConfig()
        network = build_network(network_config, embedding_dimension=encoder.dimension, seed=config.training.seed)
    else:
        pipeline = load_initial_pipeline(config.start_from, encoder)
        network = pipeline.transformer.float().requires_grad_(True)
        network_config = config_of_network(network, pipeline.config.prediction)
        network, network_config = _with_image_tokens(network, network_config, config)
        if config.network not in (None, network_config):
            raise InputError(
                f"network differs from that of {config.start_from}: {config.network}, not {network_config}; "
                "omit network"
            )
        autoencoder, scheduler = autoencoder or pipeline.vae, pipeline.scheduler
        inherited = ("candidates", "guidance_scale", "guidance_interval", "num_inference_steps", "query", "truncation")
        defaults |= {name: pipeline.config[name] for name in inherited}
        defaults["neighbours"] = min(trained_neighbours, pipeline.config.neighbours)
    if config.editing and not is_editor(network):
        network = _widened(network, autoencoder)
    if config.guidance_scale is not None:
        defaults["guidance_scale"] = config.guidance_scale
    side = image_side(network_config, autoencoder)
    if config.image_size not in (None, side):
        raise InputError(
            f"image_size does not fit the network: {config.image_size} px, not {side} px; "
            "omit image_size, or choose a network of another size"
        )
    return TrainingSetup(
        network=network,
        network_config=network_config,
        autoencoder=autoencoder,
        scheduler=scheduler,
        image_size=side,
        defaults=defaults,
    )


def objective_of(config: TrainConfig, setup: TrainingSetup) -> Objective:
    """Return the training objective for the network of ``setup``."""
    network = setup.network_config
    if isinstance(network, VQTransformerConfig):
        return MaskAndReplace(Transitions(codes=network.codes, timesteps=network.timesteps), config.conditioning)
    if config.editing:
        return Restoration(config.conditioning, config.restoration, prediction=setup.prediction)
    return FlowMatching(config.conditioning, setup.prediction)


def load_initial_pipeline(start_from: str, encoder: EncoderIdentity) -> KNNDiffusionPipeline:
    """Load the pipeline to fine-tune.

    Raises ``EncoderMismatchError`` if it was trained with another encoder, and ``InputError`` if it was distilled.
    """
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(start_from))
    if not pipeline.identity.same_space(encoder):
        raise EncoderMismatchError(
            f"encoders differ: {start_from} was trained with {pipeline.identity}, the images were embedded with "
            f"{encoder}; embed the images with the encoder of the generator, or start from random weights"
        )
    if pipeline.config.noise_levels is not None:
        raise InputError(
            f"start_from was distilled to few steps: {start_from}; start from the generator it learned from"
        )
    return pipeline


def load_autoencoder(folder: str) -> Autoencoder:
    """Load the AutoencoderKL or VQModel in ``folder``, frozen. Raises ``InputError`` if it is missing or damaged."""
    classes = {kind.__name__: kind for kind in get_args(Autoencoder)}
    try:
        name = json.loads((Path(folder) / "config.json").read_text())["_class_name"]
        loaded: Autoencoder = classes[name].from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True)
        check_weights(Path(folder), loaded)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ModelError) as error:
        raise InputError(
            f"cannot load an autoencoder: {folder} ({error}); give a folder written by save_pretrained of "
            f"{' or '.join(classes)}"
        ) from error
    return loaded.eval().requires_grad_(False)


def image_side(network: NetworkConfig, autoencoder: Autoencoder | None) -> int:
    """Return the side in px of the images of a network and its autoencoder. Raises ``InputError`` for a mismatch."""
    if autoencoder is None:
        if isinstance(network, VQTransformerConfig):
            raise InputError("a network over codes has no autoencoder; set autoencoder to the folder of a VQModel")
        if network.channels != 3:
            raise InputError(
                f"the network does not fit RGB images: {network.channels} channels; set autoencoder, or channels to 3"
            )
        return network.image_size
    settings: Any = autoencoder.config
    scale: int = 2 ** (len(settings.block_out_channels) - 1)
    if not isinstance(network, VQTransformerConfig):
        channels = _latent_channels(autoencoder)
        if network.channels != channels:
            raise InputError(
                f"the network does not fit the autoencoder: {network.channels} channels, the latents have {channels}; "
                f"set channels={channels}"
            )
        return network.image_size * scale
    side = math.isqrt(network.tokens) * scale
    if (
        not isinstance(autoencoder, VQModel)
        or settings.num_vq_embeddings != network.codes
        or settings.sample_size != side
    ):
        given = (
            f"{settings.num_vq_embeddings} codes at {settings.sample_size} px"
            if isinstance(autoencoder, VQModel)
            else "no codes"
        )
        raise InputError(
            f"the network does not fit the autoencoder: it needs a VQModel of {network.codes} codes at {side} px, "
            f"the autoencoder has {given}; set codes and tokens to match the autoencoder"
        )
    return side


def _latent_channels(autoencoder: Autoencoder) -> int:
    """Return the number of latent channels; for a VQModel, the width of its codebook vectors."""
    settings: Any = autoencoder.config
    width = settings.vq_embed_dim if isinstance(autoencoder, VQModel) else None
    return int(width or settings.latent_channels)


def _with_image_tokens(
    network: AnyNetwork, built: NetworkConfig, config: TrainConfig
) -> tuple[AnyNetwork, NetworkConfig]:
    """Add the image tokens that ``config.network`` has and ``network``, built with the config ``built``, lacks."""
    wanted = config.network
    if not isinstance(wanted, TransformerConfig) or not isinstance(built, TransformerConfig):
        return network, built
    if not wanted.neighbour_images or not isinstance(network, PixArtTransformer2DModel) or takes_images(network):
        return network, built
    images, patch = wanted.neighbour_images, wanted.neighbour_patch
    if dataclasses.replace(built, neighbour_images=images, neighbour_patch=patch) != wanted:
        return network, built
    return add_image_tokens(network, images=images, patch=patch, seed=config.training.seed), wanted


def _widened(network: AnyNetwork, autoencoder: Autoencoder | None) -> AnyNetwork:
    if autoencoder is not None or not isinstance(network, PixArtTransformer2DModel):
        raise InputError("editing needs a transformer over pixels; start from one, or omit editing")
    try:
        return widen_input(network)
    except ModelError as error:
        raise InputError(str(error)) from error
