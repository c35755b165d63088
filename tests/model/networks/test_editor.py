from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from support import tiny_models

from model.errors import ModelError
from model.networks.denoiser import as_denoiser
from model.networks.editor import is_editor, widen_input, with_reference

GENERATOR = torch.Generator().manual_seed(0)
NOISY, REFERENCE = torch.randn(2, 2, 3, 8, 8, generator=GENERATOR)
TOKENS = torch.randn(2, 4, tiny_models.WIDTH + 1, generator=GENERATOR)
SIGMA = torch.tensor([0.3, 0.8])


def predict(network: PixArtTransformer2DModel, reference: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return with_reference(as_denoiser(network, "sample"), reference)(NOISY, SIGMA, TOKENS)


def test_widen_input_output_equals_the_base_for_any_reference() -> None:
    base = tiny_models.network()
    wide = widen_input(base)
    with torch.no_grad():
        expected = as_denoiser(base, "sample")(NOISY, SIGMA, TOKENS)
    assert expected.abs().min() > 0
    assert torch.equal(predict(wide, REFERENCE), expected)
    assert torch.equal(predict(wide, None), expected)
    assert (is_editor(wide), is_editor(base)) == (True, False)


def test_widen_input_training_the_copy_leaves_the_base_unchanged() -> None:
    base = tiny_models.network()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    wide = widen_input(base)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter += 0.1
    assert base.config.in_channels == 3
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert not torch.equal(predict(wide, REFERENCE), predict(wide, None))


def test_widen_input_new_channels_get_a_gradient() -> None:
    wide = widen_input(tiny_models.network())
    with_reference(as_denoiser(wide, "sample"), REFERENCE)(NOISY, SIGMA, TOKENS).square().mean().backward()
    assert wide.pos_embed.proj.weight.grad[:, 3:].abs().max() > 0


def test_widen_input_network_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    wide = widen_input(tiny_models.network())
    with torch.no_grad():
        wide.pos_embed.proj.weight += 0.1
    wide.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert (loaded.config.in_channels, loaded.config.out_channels) == (6, 3)
    torch.testing.assert_close(
        predict(loaded, REFERENCE), predict(wide, REFERENCE)
    )  # the loaded one uses diffusers' attention


def test_with_reference_doubled_batch_repeats_the_reference() -> None:
    calls = []

    def denoiser(noisy: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        calls.append(noisy)
        return noisy[:, :3]

    with_reference(denoiser, REFERENCE)(NOISY.repeat(2, 1, 1, 1), SIGMA.repeat(2), TOKENS.repeat(2, 1, 1))
    assert torch.equal(calls[0], torch.cat([torch.cat([NOISY, REFERENCE], dim=1)] * 2))


def test_with_reference_hides_the_reference_up_to_a_noise_level() -> None:
    shown = {}

    def denoiser(noisy: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shown[float(sigma[0])] = bool(noisy[:, 3:].any())
        return noisy[:, :3]

    denoise = with_reference(denoiser, REFERENCE, above=0.5)
    for level in (1.0, 0.75, 0.5, 0.25):
        denoise(NOISY, torch.full((2,), level), TOKENS)
    assert shown == {1.0: True, 0.75: True, 0.5: False, 0.25: False}


def test_with_reference_shown_always_does_not_read_the_noise_level() -> None:
    unreadable = torch.empty(2, device="meta")  # as on a GPU, where reading it would wait for the device
    assert torch.equal(with_reference(lambda noisy, *_: noisy[:, 3:], REFERENCE)(NOISY, unreadable, TOKENS), REFERENCE)


def test_widen_input_editor_raises() -> None:
    with pytest.raises(ModelError, match="cannot widen 6 input channels to 6"):
        widen_input(widen_input(tiny_models.network()))
