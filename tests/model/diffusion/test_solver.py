from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.diffusion.solver import new_scheduler, sample_noise, sample_uniforms, solve


@pytest.mark.parametrize("steps", [1, 499, 500, 1000])
def test_solve_any_number_of_steps_reaches_the_image(steps: int) -> None:
    image, noise = (torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    numbers: list[int] = []

    def denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return (noisy - image) / sigma[:, None, None, None]

    result = solve(denoiser, noise, torch.zeros(2, 1, 1), new_scheduler(), steps, numbers.append)
    torch.testing.assert_close(result, image, atol=1e-5, rtol=0)
    assert numbers == list(range(1, steps + 1))


@pytest.mark.parametrize("sample", [sample_noise, sample_uniforms])
def test_sample_noise_rows_do_not_depend_on_the_count(sample: Callable[..., Tensor]) -> None:
    many, few = (sample(count, (3, 4), torch.Generator().manual_seed(5), shared=False) for count in (6, 2))
    assert torch.equal(many[:2], few)
    assert not torch.equal(many[0], many[1])
    shared = sample(6, (3, 4), torch.Generator().manual_seed(5), shared=True)
    assert torch.equal(shared, few[:1].expand(6, 3, 4))
