import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from torch import Tensor, nn

from model.configs import ConditioningConfig
from model.diffusion.few_steps import few_step_levels, solve_few_steps
from model.networks.editor import generating
from model.networks.image_tokens import ShownImages, add_image_tokens
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.neighbour_rows import NeighbourImages, NeighbourRows
from model.training.objectives.distillation import Distillation, Teacher

BATCH = 8
CONDITIONING = ConditioningConfig(neighbours=2, pool=2)
LEVELS = few_step_levels(2)


class Analytic(nn.Module):
    """A network of the velocity rate · x + offset; the offset is that of the condition, 0 if it is hidden."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.config, self.dtype, self.inputs = rate, {}, torch.float32, list[tuple[Tensor, Tensor]]()

    def forward(self, noisy: Tensor, *, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        self.inputs.append((noisy, timestep / 1000))
        offset = encoder_hidden_states[..., :-1].square().mean((1, 2))
        return (self.rate * noisy + offset[:, None, None, None],)


def batch(count: int = BATCH) -> Batch:
    rows = torch.from_numpy(tiny_models.unit_rows(3 * count)).float()
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images=images, query=rows[:count], neighbours=rows[count:].reshape(count, 2, -1))


def noisy_inputs() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(1))
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0, 0.7, 0.5]), tokens


def test_mean_velocity_of_a_linear_teacher_leads_to_its_end_point() -> None:
    noisy, sigma, tokens = noisy_inputs()
    teacher: Any = Analytic(2.0)
    length = (sigma - 0.4)[:, None, None, None]
    ends = {}
    for substeps in (1, 4, 1000):
        mean = Teacher(network=teacher).mean_velocity(noisy, sigma, 0.4, 0 * tokens, substeps)
        ends[substeps] = noisy - length * mean
        expected = noisy * (1 - 2 * length / substeps) ** substeps
        torch.testing.assert_close(ends[substeps], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends[1000], noisy * torch.exp(-2 * length), rtol=2e-3, atol=2e-3)


def test_velocity_is_guided_at_the_levels_of_the_interval_only() -> None:
    noisy, sigma, tokens = noisy_inputs()
    network: Any = Analytic(1.0)
    guide: Any = Analytic(0.5)
    conditional = generating(network, "velocity")(noisy, sigma, tokens)
    offset = conditional - noisy
    interval = (0.6, 0.9)
    alone = Teacher(network=network, guidance_scale=3.0, guidance_interval=interval).velocity(noisy, sigma, tokens)
    torch.testing.assert_close(alone[1], noisy[1] + 3 * offset[1])
    weaker = Teacher(network=network, guidance_scale=3.0, guidance_interval=interval, guide=guide)
    guided = weaker.velocity(noisy, sigma, tokens)
    torch.testing.assert_close(guided[1], 0.5 * noisy[1] + 3 * (0.5 * noisy[1] + offset[1]))
    for outside in (0, 2):
        torch.testing.assert_close(alone[outside], conditional[outside])
        torch.testing.assert_close(guided[outside], conditional[outside])


def test_distillation_of_a_constant_velocity_has_no_loss_and_follows_the_teacher() -> None:
    teacher, student = Analytic(0.0), Analytic(0.0)
    network: Any = teacher
    loss = Distillation(CONDITIONING, Teacher(network=network), LEVELS, restarts=0)(student, batch(), StepRandom(0, 0))
    assert loss == pytest.approx(0, abs=1e-9)
    (first, sigma), (second, lower) = student.inputs
    assert sigma.tolist() == [1.0] * BATCH
    assert lower.tolist() == pytest.approx([LEVELS[1]] * BATCH)
    expected, _ = teacher.inputs[-1]
    assert not torch.equal(second, first)
    assert (second - expected).std(dim=(1, 2, 3)).max() < 1e-4, "the teacher ends the second interval from the same x"


def test_distillation_restarts_from_noised_images_inside_of_the_intervals() -> None:
    student, network = Analytic(0.0), Analytic(0.0)
    data = batch(200)
    teacher: Any = network
    Distillation(CONDITIONING, Teacher(network=teacher), LEVELS, restarts=1)(student, data, StepRandom(0, 0))
    for (noisy, sigma), top, bottom in zip(student.inputs, LEVELS, (*LEVELS[1:], 0.0), strict=True):
        assert bottom <= sigma.min() < sigma.max() <= top
        noise = (noisy - (1 - sigma)[:, None, None, None] * data.images) / sigma[:, None, None, None]
        assert noise.std() == pytest.approx(1, abs=0.02)
    student.inputs.clear()
    Distillation(CONDITIONING, Teacher(network=teacher), LEVELS, restarts=0.5)(student, data, StepRandom(0, 0))
    assert 60 < int((student.inputs[0][1] == 1).sum()) < 140


def test_distillation_is_the_same_for_a_batch_in_parts() -> None:
    data, network = batch(), tiny_models.network()
    objective = Distillation(CONDITIONING, Teacher(network=tiny_models.network(seed=1), guidance_scale=2.0), LEVELS)
    whole = objective(network, data, StepRandom(0, 3))
    parts = []
    for part, rows in enumerate((slice(0, 4), slice(4, 8))):
        piece = Batch(images=data.images[rows], query=data.query[rows], neighbours=data.neighbours[rows])
        parts.append(objective(network, piece, StepRandom(0, 3, part=part, parts=2)))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_distillation_state_has_no_teacher() -> None:
    objective = Distillation(CONDITIONING, Teacher(network=tiny_models.network()), LEVELS)
    assert not objective.state_dict()
    assert not list(objective.parameters())


def test_distillation_shows_the_same_images_to_student_and_teacher() -> None:
    network = tiny_models.stirred(add_image_tokens(tiny_models.network()))
    rows = NeighbourRows(np.random.default_rng(0).integers(0, 256, (2 * BATCH, 8, 8, 3), dtype=np.uint8), "cpu")
    shown = NeighbourImages(ids=torch.arange(2 * BATCH).reshape(BATCH, 2), rows=rows)
    data = dataclasses.replace(batch(), neighbour_images=shown)
    conditioning = ConditioningConfig(neighbours=2, pool=2, drop_images=0, drop_all=0, drop_neighbours=0)

    def loss(teacher: Teacher) -> float:
        objective = Distillation(conditioning, teacher, LEVELS, substeps=1, restarts=0)
        return float(objective(network, data, StepRandom(0, 0)).detach())

    assert loss(Teacher(network=network)) == pytest.approx(0, abs=1e-9), "the student equals a teacher of one sub-step"

    class Blind(Teacher):
        """A teacher that is shown no image."""

        def tokens(self, tokens: Tensor, shown: ShownImages | None) -> Tensor:
            return tokens

    assert loss(Blind(network=network)) > 1e-4


def test_distillation_lowers_the_error_of_few_steps() -> None:
    network = tiny_models.network()
    with torch.no_grad():
        for part in network.parameters():
            part *= 0.6
    teacher, student = Teacher(network=network, guidance_scale=2.0), tiny_models.network().requires_grad_(True)
    student.load_state_dict(network.state_dict())
    objective, data = Distillation(CONDITIONING, teacher, LEVELS, substeps=3, restarts=0), batch()
    tokens = torch.cat([data.query[:, None], data.neighbours], dim=1) * tiny_models.WIDTH**0.5
    tokens = torch.cat([tokens, torch.tensor([1.0, 0, 0])[None, :, None].expand(BATCH, 3, 1)], dim=2)
    noise = StepRandom(9, 9).normal(BATCH, 3, 8, 8)
    expected = solve_few_steps(teacher.velocity, noise, tokens, few_step_levels(30), lambda _: None)

    @torch.no_grad()
    def error() -> float:
        end = solve_few_steps(generating(student, "velocity"), noise, tokens, LEVELS, lambda _: None)
        return float((end - expected).square().mean())

    before = error()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3, weight_decay=0)
    for step in range(30):
        optimizer.zero_grad()
        objective(student, data, StepRandom(0, step)).backward()
        optimizer.step()
    assert error() < 0.5 * before
