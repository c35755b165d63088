import pytest
import torch
from support import tiny_models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.diffusion.conditioning import ConditioningConfig
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
SHOWN = ConditioningConfig(
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


class Recorded(nn.Module):
    """A transformer that keeps what it was called with."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, torch.float32
        self.noisy = self.tokens = self.timestep = torch.empty(0)

    def forward(self, noisy: Tensor, *, timestep: Tensor, encoder_hidden_states: Tensor, **options: object) -> object:
        self.noisy, self.timestep, self.tokens = noisy, timestep, encoder_hidden_states
        return self.inner(noisy, timestep=timestep, encoder_hidden_states=encoder_hidden_states, **options)


def test_a_network_that_says_nothing_errs_by_the_velocity() -> None:
    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)  # its head is zero
    given, noise = batch(), StepRandom(1, 2)
    loss = FlowMatching(SHOWN)(network, given, StepRandom(1, 2))
    noise.uniform(BATCH, 1), noise.uniform(BATCH, 1), noise.normal(BATCH, tiny_models.WIDTH)  # the text gap's
    noise.uniform(BATCH, 1), noise.uniform(BATCH, 1), noise.uniform(BATCH)  # the neighbours' and the drops'
    noise.normal(BATCH)  # σ
    expected = (noise.normal(BATCH, 3, 8, 8) - given.images).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_shows_the_network_noisy_images_their_level_and_their_condition() -> None:
    network, given = Recorded(tiny_models.network()), batch()
    FlowMatching(SHOWN)(network, given, StepRandom(0, 0)).backward()
    assert network.noisy.shape == (BATCH, 3, 8, 8)
    assert ((network.timestep > 0) & (network.timestep < 1000)).all()
    assert len(network.timestep.unique()) == BATCH, "a level for each picture"
    torch.testing.assert_close(network.tokens[:, 0, :-1], given.query * tiny_models.WIDTH**0.5, atol=2e-3, rtol=0)
    torch.testing.assert_close(network.tokens[:, 1:, :-1], given.neighbours * tiny_models.WIDTH**0.5)
    assert all(parameter.grad is not None for parameter in network.inner.parameters())


def test_an_editor_is_shown_no_image_and_learns_as_its_base_does() -> None:
    base, given = tiny_models.network(), batch()
    editor = Recorded(widen_input(base))
    loss = FlowMatching(SHOWN)(editor, given, StepRandom(0, 0))
    assert editor.noisy.shape == (BATCH, EDITOR_CHANNELS, 8, 8)
    assert not editor.noisy[:, 3:].any()
    assert loss.item() == pytest.approx(FlowMatching(SHOWN)(base, given, StepRandom(0, 0)).item(), rel=1e-5)


def test_a_wrapped_editor_is_known_too() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *given: object, **options: object) -> object:
            return self.module(*given, **options)

    editor, given = widen_input(tiny_models.network()), batch()
    wrapped = FlowMatching(SHOWN)(Wrapped(editor), given, StepRandom(0, 0))
    assert wrapped.item() == FlowMatching(SHOWN)(editor, given, StepRandom(0, 0)).item()


def test_parts_of_a_step_have_the_loss_of_the_whole() -> None:
    network, given, objective = tiny_models.network(), batch(), FlowMatching(ConditioningConfig(neighbours=2, pool=2))
    halves = [
        Batch(images=given.images[rows], query=given.query[rows], neighbours=given.neighbours[rows])
        for rows in (slice(0, 3), slice(3, 6))
    ]
    parts = [objective(network, half, StepRandom(4, 5, part=part, parts=2)) for part, half in enumerate(halves)]
    assert torch.stack(parts).mean().item() == pytest.approx(
        objective(network, given, StepRandom(4, 5)).item(), rel=1e-5
    )


class DrawnThere:
    """Draws on a device that is not here, whose tensors have a place and a shape but no values."""

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    uniform = normal


@pytest.mark.parametrize("learned", ["codes", "autoencoder"])
def test_an_objective_makes_its_tensors_where_its_batch_is(learned: str) -> None:
    transitions = Transitions(codes=8, timesteps=10)
    with FakeTensorMode():  # refuses what mixes devices
        with torch.device("cuda"):
            if learned == "codes":
                network = VQTransformer(codes=8, tokens=4, timesteps=10, layers=1, heads=1, condition_channels=9)
                images = torch.zeros(3, 4, dtype=torch.int64)
            else:
                network = build_autoencoder(AutoencoderConfig(image_size=16, channels=(8, 8, 16)), seed=0)
                images = torch.zeros(3, 3, 16, 16)
            given = Batch(images=images, query=torch.zeros(3, 8), neighbours=torch.zeros(3, 2, 8))
        objective = MaskAndReplace(transitions, SHOWN) if learned == "codes" else AutoencoderObjective(1024)
        loss = objective.to("cuda")(network, given, DrawnThere())
    assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
