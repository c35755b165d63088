import pytest
import torch
from torch import nn

from model.training.ema import ema_copy, ema_decay, ema_update


def test_ema_decay_warms_up_to_its_value() -> None:
    assert [ema_decay(step, 0.5) for step in (0, 2, 7, 8, 9, 1_000)] == pytest.approx(
        [0.1, 0.25, 8 / 17, 0.5, 0.5, 0.5]
    )
    assert ema_decay(100_000, 0.999) == 0.999
    assert ema_decay(0, 0.0) == 0.0


def test_ema_copy_is_independent_and_frozen() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    average = ema_copy(network)
    with torch.no_grad():
        network[0].weight.fill_(7)
    assert (average[0].weight != 7).all()
    assert not average[1].training
    assert network[1].training
    assert [parameter.requires_grad for parameter in average.parameters()] == [False, False]
    assert [parameter.requires_grad for parameter in network.parameters()] == [True, True]


def test_ema_update_interpolates_weights_and_copies_buffers() -> None:
    network = nn.BatchNorm1d(3)
    average = ema_copy(network)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([1.0, 2.0, 5.0]))  # the average starts at 1
    network.running_mean.fill_(4.0)
    network.num_batches_tracked.fill_(9)

    ema_update(average, network, 0.75)

    assert average.weight.tolist() == pytest.approx([1.0, 1.25, 2.0])
    assert network.weight.tolist() == [1.0, 2.0, 5.0]
    assert average.running_mean.tolist() == [4.0] * 3
    assert average.num_batches_tracked.item() == 9

    ema_update(average, network, 0.75)
    assert average.weight.tolist() == pytest.approx([1.0, 1.4375, 2.75])


def test_ema_update_constant_network_equals_its_average() -> None:
    network = nn.Linear(3, 3)
    average = ema_copy(network)
    for step in range(20):
        ema_update(average, network, ema_decay(step, 0.99))
    assert torch.equal(average.weight, network.weight)
