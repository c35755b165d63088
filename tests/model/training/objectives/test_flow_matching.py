import pytest
import torch
from support import tiny_models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.configs import ConditioningConfig
from model.diffusion.flow_matching import NoiseLevels
from model.diffusion.vq_diffusion import Transitions
from model.networks.dit import build_transformer
from model.networks.editor import EDITOR_CHANNELS, widen_input
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.networks.vq_transformer import VQTransformer
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.objectives.autoencoder import AutoencoderObjective
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.vq_diffusion import MaskAndReplace

BATCH = 6
ALL_SHOWN = ConditioningConfig(
    neighbours=2, pool=2, fewer_neighbours=0, drop_all=0, drop_query=0, drop_neighbours=0, gap_probability=0
)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(tiny_models.unit_rows(3 * BATCH)).float()
    return Batch(
        images=torch.rand(BATCH, 3, 8, 8, generator=generator) * 2 - 1,
        query=rows[:BATCH],
        neighbours=rows[BATCH:].reshape(BATCH, 2, -1),
    )


class RecordingNetwork(nn.Module):
    """Transformer that records its inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, torch.float32
        self.noisy = self.tokens = self.timestep = torch.empty(0)

    def forward(self, noisy: Tensor, *, timestep: Tensor, encoder_hidden_states: Tensor, **options: object) -> object:
        self.noisy, self.timestep, self.tokens = noisy, timestep, encoder_hidden_states
        return self.inner(noisy, timestep=timestep, encoder_hidden_states=encoder_hidden_states, **options)


def test_flow_matching_zero_output_loss_is_the_mean_square_of_the_velocity() -> None:
    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)  # the head is zero
    data, rng = batch(), StepRandom(1, 2)
    loss = FlowMatching(ALL_SHOWN)(network, data, StepRandom(1, 2))
    rng.uniform(BATCH, 1), rng.uniform(BATCH, 1), rng.normal(BATCH, tiny_models.WIDTH)  # perturb_query
    rng.uniform(BATCH, 1), rng.uniform(BATCH, 1), rng.uniform(BATCH)  # subsample_neighbours, and hiding
    rng.normal(BATCH)  # σ
    expected = (rng.normal(BATCH, 3, 8, 8) - data.images).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_flow_matching_network_inputs_are_noisy_images_sigma_and_condition() -> None:
    network, data = RecordingNetwork(tiny_models.network()), batch()
    FlowMatching(ALL_SHOWN)(network, data, StepRandom(0, 0)).backward()
    assert network.noisy.shape == (BATCH, 3, 8, 8)
    assert ((network.timestep > 0) & (network.timestep < 1000)).all()
    assert len(network.timestep.unique()) == BATCH, "one level per image"
    torch.testing.assert_close(network.tokens[:, 0, :-1], data.query * tiny_models.WIDTH**0.5, atol=2e-3, rtol=0)
    torch.testing.assert_close(network.tokens[:, 1:, :-1], data.neighbours * tiny_models.WIDTH**0.5)
    assert all(parameter.grad is not None for parameter in network.inner.parameters())


def test_flow_matching_levels_shift_the_noise_levels() -> None:
    network, data = RecordingNetwork(tiny_models.network()), batch()
    FlowMatching(ALL_SHOWN, levels=NoiseLevels(mean=3.0, deviation=0.1))(network, data, StepRandom(0, 0))
    assert (network.timestep > 900).all()


def test_flow_matching_editor_gets_no_reference_and_has_the_loss_of_its_base() -> None:
    base, data = tiny_models.network(), batch()
    editor = RecordingNetwork(widen_input(base))
    loss = FlowMatching(ALL_SHOWN)(editor, data, StepRandom(0, 0))
    assert editor.noisy.shape == (BATCH, EDITOR_CHANNELS, 8, 8)
    assert not editor.noisy[:, 3:].any()
    assert loss.item() == pytest.approx(FlowMatching(ALL_SHOWN)(base, data, StepRandom(0, 0)).item(), rel=1e-5)


def test_flow_matching_wrapped_editor_is_recognised() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: object, **options: object) -> object:
            return self.module(*arguments, **options)

    editor, data = widen_input(tiny_models.network()), batch()
    wrapped = FlowMatching(ALL_SHOWN)(Wrapped(editor), data, StepRandom(0, 0))
    assert wrapped.item() == FlowMatching(ALL_SHOWN)(editor, data, StepRandom(0, 0)).item()


def test_flow_matching_mean_loss_of_parts_equals_that_of_the_batch() -> None:
    network, data, objective = tiny_models.network(), batch(), FlowMatching(ConditioningConfig(neighbours=2, pool=2))
    halves = [
        Batch(images=data.images[rows], query=data.query[rows], neighbours=data.neighbours[rows])
        for rows in (slice(0, 3), slice(3, 6))
    ]
    parts = [objective(network, half, StepRandom(4, 5, part=part, parts=2)) for part, half in enumerate(halves)]
    assert torch.stack(parts).mean().item() == pytest.approx(
        objective(network, data, StepRandom(4, 5)).item(), rel=1e-5
    )


class CudaRandom:
    """Random source on a device that need not exist: fake tensors have a device and a shape but no values."""

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    uniform = normal


@pytest.mark.parametrize("trained", ["codes", "autoencoder"])
def test_objective_creates_its_tensors_on_the_device_of_the_batch(trained: str) -> None:
    transitions = Transitions(codes=8, timesteps=10)
    with FakeTensorMode():  # raises for operations that mix devices
        with torch.device("cuda"):
            if trained == "codes":
                network = VQTransformer(codes=8, tokens=4, timesteps=10, layers=1, heads=1, condition_channels=9)
                images = torch.zeros(3, 4, dtype=torch.int64)
            else:
                network = build_autoencoder(AutoencoderConfig(image_size=16, channels=(8, 8, 16)), seed=0)
                images = torch.zeros(3, 3, 16, 16)
            data = Batch(images=images, query=torch.zeros(3, 8), neighbours=torch.zeros(3, 2, 8))
        objective = MaskAndReplace(transitions, ALL_SHOWN) if trained == "codes" else AutoencoderObjective(1024)
        loss = objective.to("cuda")(network, data, CudaRandom())
    assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
