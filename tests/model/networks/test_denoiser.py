import dataclasses
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor, nn

from model.networks.build import NetworkConfig, build_network, config_of_network
from model.networks.denoiser import as_denoiser, build_denoiser
from model.networks.dit import TransformerConfig
from model.networks.editor import widen_input
from model.networks.unet import UNetConfig
from model.networks.vq_transformer import VQTransformer, VQTransformerConfig

UNET = UNetConfig(image_size=8, widths=(32, 64), layers=1)
SIZES: list[NetworkConfig] = [
    tiny_models.size(channels=4, heads=2, prediction="sample"),
    UNET,
    UNetConfig(image_size=16, channels=4, widths=(64, 128), layers=2, head_width=64, prediction="sample"),
    VQTransformerConfig(codes=8, tokens=4, timesteps=10, layers=1, heads=2, head_width=8),
]


def given(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 3, 8, 8, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, 3, tiny_models.WIDTH + 1, generator=generator),
    )


class Echo(nn.Module):
    """A network that answers with what it was asked, in its own type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.asked = dtype, dict[str, Any]()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, noisy: Tensor, **asked: Any) -> tuple[Tensor]:
        self.asked = {"noisy": noisy, **asked}
        return (noisy[:, :3],)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_network_is_given_has_the_type_of_its_weights_but_for_its_level(dtype: torch.dtype) -> None:
    network, (noisy, sigma, tokens) = Echo(dtype), given()
    output = as_denoiser(network, "velocity")(noisy, sigma, tokens)
    assert (network.asked["noisy"].dtype, network.asked["encoder_hidden_states"].dtype) == (dtype, dtype)
    assert network.asked["timestep"].dtype == torch.float32, "a thousand levels need more than bfloat16's eight bits"
    torch.testing.assert_close(network.asked["timestep"], sigma * 1000)
    assert output.dtype == torch.float32


def test_a_clean_image_becomes_the_velocity_towards_it() -> None:
    noisy, sigma, tokens = given()
    sigma = torch.tensor([0.5, 0.8])
    network = Echo(torch.float32)
    output = as_denoiser(network, "sample")(torch.cat([noisy, noisy], dim=1), sigma, tokens)
    assert not output.any(), "it says that the noisy picture is the clean one"
    assert output.shape == (2, 3, 8, 8), "of the channels that it answers with"


def test_a_wrapped_network_is_called_through_its_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *asked: Any, **options: Any) -> Any:
            self.calls += 1
            return self.module(*asked, **options)

    for config in (tiny_models.size(), UNET):
        network = build_denoiser(config, embedding_dimension=tiny_models.WIDTH, seed=0)
        wrapper = Wrapper(network)
        torch.testing.assert_close(
            as_denoiser(wrapper, "velocity")(*given()), as_denoiser(network, "velocity")(*given())
        )
        assert wrapper.calls == 1


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.kind)
def test_a_network_tells_the_size_that_it_was_built_from(size: NetworkConfig) -> None:
    network = build_network(size, embedding_dimension=tiny_models.WIDTH, seed=0)
    assert config_of_network(network, getattr(size, "prediction", "velocity")) == size
    if not isinstance(network, VQTransformer):
        assert next(network.parameters()).dtype == torch.float32


def test_an_editors_size_is_that_of_its_base() -> None:
    base = tiny_models.network()
    assert config_of_network(widen_input(base), "velocity") == config_of_network(base, "velocity") == tiny_models.size()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.kind)
def test_a_size_goes_through_a_form_as_itself(size: NetworkConfig) -> None:
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[NetworkConfig] = TypeAdapter(NetworkConfig)
    assert adapter.validate_python(dataclasses.asdict(size)) == size
    assert adapter.validate_json(adapter.dump_json(size)) == size
    assert type(adapter.validate_python({"kind": size.kind})) is type(size)
    with pytest.raises(ValidationError):
        adapter.validate_python({**dataclasses.asdict(size), "kind": "other"})
    assert isinstance(adapter.validate_python({"image_size": 64, "heads": 8}), TransformerConfig)
