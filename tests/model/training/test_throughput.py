import time

import pytest
import torch
from torch import nn

from model.training.throughput import flops_per_image, matrix_peak


def test_flops_per_image_matrix_product_counts_two_per_multiplication() -> None:
    layer, inputs = nn.Linear(32, 16, bias=False), torch.ones(4, 32)
    forward = 2 * 4 * 32 * 16
    # Backward: the gradient of the weights, and that of the input if it requires one.
    assert flops_per_image(lambda: layer(inputs).sum()) == 2 * forward
    assert flops_per_image(lambda: layer(inputs.clone().requires_grad_()).sum()) == 3 * forward


def test_flops_per_image_keeps_the_gradients() -> None:
    layer = nn.Linear(3, 1, bias=False)
    flops_per_image(lambda: layer(torch.tensor([[1.0, 2.0, 3.0]])).sum())
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1, 2, 3]]


def test_matrix_peak_is_plausible_for_this_cpu() -> None:
    left = right = torch.ones(512, 512)
    left @ right
    started = time.perf_counter()
    for _ in range(4):
        left @ right
    measured = 4 * 2 * 512**3 / (time.perf_counter() - started)
    assert matrix_peak(torch.device("cpu")) > measured / 10
    assert matrix_peak(torch.device("cpu")) < 1e14, "no CPU is that fast"


def test_matrix_peak_keeps_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    matrix_peak(torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_flops_per_image_loss_without_gradients_raises() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        flops_per_image(lambda: torch.ones(()))
