"""Preview images of a network in training: few steps, no guidance.

Legend: ``B`` images, ``S`` side.
"""

import torch
from torch import Tensor

from model.configs import Prediction
from model.diffusion.conditioning import append_image_tokens, condition_tokens
from model.generation.backbone import new_backbone
from model.networks.build import AnyNetwork
from model.networks.image_tokens import choose_distinct, takes_images
from model.networks.latents import Autoencoder, decode_latents
from model.networks.vq_autoencoder import decode_codes
from model.training.batch import Batch

STEPS = 8
"""Sampling steps of a preview."""


@torch.no_grad()
def generate_preview(
    network: AnyNetwork, batch: Batch, *, prediction: Prediction, autoencoder: Autoencoder | None, seed: int = 0
) -> Tensor:
    """Generate an image for each query and its neighbours in ``batch``, from the same noise at every call.

    The network is left in evaluation mode.

    Args:
        network: The network in training, not sharded.
        batch: Queries and neighbours, on the network's device. Without images of neighbours, the network sees none.
        prediction: Output of a continuous network.
        autoencoder: Autoencoder of the network's latents or codes; None for a network over pixels.
        seed: Seed of the noise. Default: 0.

    Returns:
        (B, 3, S, S) in [−1, 1] on the CPU.
    """
    backbone, count = new_backbone(network.eval(), vae=autoencoder, prediction=prediction), len(batch.query)
    tokens = condition_tokens(batch.query, batch.neighbours, dimension=batch.query.shape[1], batch=count)
    if takes_images(network) and batch.neighbour_images is not None:
        cosines = batch.cosines()
        visible = torch.ones_like(cosines, dtype=torch.bool)
        first, shown = choose_distinct(cosines, visible, network.config.neighbour_images)
        encoded = network.encode_images(batch.neighbour_images.choose(first), shown)
        tokens = append_image_tokens(tokens, encoded)
    steps = min(STEPS, backbone.max_steps or STEPS)
    noise = backbone.noise(count, steps, torch.Generator().manual_seed(seed))
    images = backbone.generate(
        tokens, noise.to(tokens.device), steps=steps, guidance_scale=1.0, negative=None, on_step=lambda _: None
    )
    return images.cpu()


@torch.no_grad()
def decode_targets(targets: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    """Decode training targets, pixels or latents (B, C, s, s) or codes (B, n), to images (B, 3, S, S) on the CPU."""
    if targets.ndim == 2:
        targets = decode_codes(autoencoder, targets)
    elif autoencoder is not None:
        targets = decode_latents(autoencoder, targets)
    return targets.float().clamp(-1, 1).cpu()
