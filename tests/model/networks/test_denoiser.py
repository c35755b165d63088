import dataclasses
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor, nn

from model.configs import NetworkConfig, TransformerConfig, UNetConfig, VQTransformerConfig
from model.networks.build import build_network, config_of_network
from model.networks.denoiser import as_denoiser, build_denoiser
from model.networks.editor import widen_input
from model.networks.vq_transformer import VQTransformer

UNET = UNetConfig(image_size=8, widths=(32, 64), layers=1)
SIZES: list[NetworkConfig] = [
    tiny_models.size(channels=4, heads=2, prediction="sample"),
    tiny_models.size(neighbour_images=2, neighbour_patch=4),
    tiny_models.size(rotary=True),
    tiny_models.size(rotary=True, neighbour_images=1, neighbour_patch=4),
    UNET,
    UNetConfig(image_size=16, channels=4, widths=(64, 128), layers=2, head_width=64, prediction="sample"),
    VQTransformerConfig(codes=8, tokens=4, timesteps=10, layers=1, heads=2, head_width=8),
]


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 3, 8, 8, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, 3, tiny_models.WIDTH + 1, generator=generator),
    )


class Echo(nn.Module):
    """Network that records its arguments and returns the noisy image in the dtype it was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.arguments = dtype, dict[str, Any]()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, noisy: Tensor, **options: Any) -> tuple[Tensor]:
        self.arguments = {"noisy": noisy, **options}
        return (noisy[:, :3],)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_denoiser_casts_inputs_to_the_dtype_of_the_weights_but_not_the_timestep(dtype: torch.dtype) -> None:
    network, (noisy, sigma, tokens) = Echo(dtype), inputs()
    output = as_denoiser(network, "velocity")(noisy, sigma, tokens)
    assert (network.arguments["noisy"].dtype, network.arguments["encoder_hidden_states"].dtype) == (dtype, dtype)
    assert network.arguments["timestep"].dtype == torch.float32, "1,000 levels need more than the 8 bits of bfloat16"
    torch.testing.assert_close(network.arguments["timestep"], sigma * 1000)
    assert output.dtype == torch.float32


def test_as_denoiser_sample_prediction_is_converted_to_a_velocity() -> None:
    noisy, sigma, tokens = inputs()
    sigma = torch.tensor([0.5, 0.8])
    network = Echo(torch.float32)
    output = as_denoiser(network, "sample")(torch.cat([noisy, noisy], dim=1), sigma, tokens)
    assert not output.any(), "the network predicts the noisy image as clean, so the velocity is zero"
    assert output.shape == (2, 3, 8, 8), "channels of the output, not of the input"


def test_as_denoiser_wrapped_network_is_called_through_the_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return self.module(*arguments, **options)

    for config in (tiny_models.size(), UNET):
        network = build_denoiser(config, embedding_dimension=tiny_models.WIDTH, seed=0)
        wrapper = Wrapper(network)
        torch.testing.assert_close(
            as_denoiser(wrapper, "velocity")(*inputs()), as_denoiser(network, "velocity")(*inputs())
        )
        assert wrapper.calls == 1


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.kind)
def test_config_of_network_returns_the_config_it_was_built_from(size: NetworkConfig) -> None:
    network = build_network(size, embedding_dimension=tiny_models.WIDTH, seed=0)
    assert config_of_network(network, getattr(size, "prediction", "velocity")) == size
    if not isinstance(network, VQTransformer):
        assert next(network.parameters()).dtype == torch.float32


def test_config_of_network_editor_returns_the_config_of_its_base() -> None:
    base = tiny_models.network()
    assert config_of_network(widen_input(base), "velocity") == config_of_network(base, "velocity") == tiny_models.size()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.kind)
def test_network_config_survives_pydantic_round_trip(size: NetworkConfig) -> None:
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[NetworkConfig] = TypeAdapter(NetworkConfig)
    assert adapter.validate_python(dataclasses.asdict(size)) == size
    assert adapter.validate_json(adapter.dump_json(size)) == size
    assert type(adapter.validate_python({"kind": size.kind})) is type(size)
    with pytest.raises(ValidationError):
        adapter.validate_python({**dataclasses.asdict(size), "kind": "other"})
    assert isinstance(adapter.validate_python({"image_size": 64, "heads": 8}), TransformerConfig)
