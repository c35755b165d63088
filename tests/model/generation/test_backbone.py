from collections.abc import Callable

import pytest
import torch
from support import tiny_models

from model.errors import ModelError
from model.generation.backbone import new_backbone
from model.generation.continuous import ContinuousBackbone
from model.generation.discrete import DiscreteBackbone
from model.pipeline import KNNDiffusionPipeline


@pytest.mark.parametrize(
    ("make", "kind", "side", "noise_shape", "max_steps"),
    [
        (tiny_models.unet_pipeline, ContinuousBackbone, 8, (3, 8, 8), None),
        (tiny_models.latent_pipeline, ContinuousBackbone, 16, (4, 8, 8), None),
        (tiny_models.discrete_pipeline, DiscreteBackbone, 16, (5, 16), 10),
    ],
)
def test_new_backbone_describes_the_network(
    make: Callable[[], KNNDiffusionPipeline],
    kind: type,
    side: int,
    noise_shape: tuple[int, ...],
    max_steps: int | None,
) -> None:
    backbone = make().backbone
    assert isinstance(backbone, kind)
    assert (backbone.side, backbone.max_steps, backbone.condition_channels) == (side, max_steps, tiny_models.WIDTH + 1)
    assert backbone.noise_shape(5) == noise_shape
    assert backbone.noise(3, 5, None).shape == (3, *noise_shape)
    assert backbone.decode(backbone.encode(torch.zeros(2, 3, side, side))).shape == (2, 3, side, side)
    assert backbone.restorer is None


def test_new_backbone_discrete_without_vae_raises() -> None:
    network = tiny_models.discrete_pipeline().transformer
    with pytest.raises(ModelError, match="the vae is missing: a network over codes needs the VQModel"):
        new_backbone(network, vae=None)


def test_new_backbone_editor_restores_from_a_reference_and_generates_without() -> None:
    backbone = tiny_models.editor_pipeline().backbone
    assert isinstance(backbone, ContinuousBackbone)
    assert backbone.restorer is not None
    images, sigma, tokens = torch.zeros(2, 3, 8, 8), torch.ones(2), torch.zeros(2, 3, tiny_models.WIDTH + 1)
    with torch.no_grad():
        restored = backbone.restorer(torch.cat([images, images], 1), sigma, tokens)
        torch.testing.assert_close(backbone.denoiser(images, sigma, tokens), restored)
