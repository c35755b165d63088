import time

import pytest
import torch
from torch import nn

from model.training.throughput import flops_per_image, matrix_peak


def test_a_matrix_product_costs_two_operations_a_multiplication() -> None:
    layer, given = nn.Linear(32, 16, bias=False), torch.ones(4, 32)
    forward = 2 * 4 * 32 * 16
    # Backward: the gradient of the weights; that of what is given too, if it is asked for.
    assert flops_per_image(lambda: layer(given).sum()) == 2 * forward
    assert flops_per_image(lambda: layer(given.clone().requires_grad_()).sum()) == 3 * forward


def test_counting_leaves_the_gradients() -> None:
    layer = nn.Linear(3, 1, bias=False)
    flops_per_image(lambda: layer(torch.tensor([[1.0, 2.0, 3.0]])).sum())
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1, 2, 3]]


def test_the_peak_is_what_a_large_product_reaches_here() -> None:
    left = right = torch.ones(512, 512)
    left @ right
    started = time.perf_counter()
    for _ in range(4):
        left @ right
    reached = 4 * 2 * 512**3 / (time.perf_counter() - started)
    assert matrix_peak(torch.device("cpu")) > reached / 10
    assert matrix_peak(torch.device("cpu")) < 1e14, "no CPU's figure"


def test_measuring_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    matrix_peak(torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loss_without_gradients_cannot_be_counted() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        flops_per_image(lambda: torch.ones(()))
