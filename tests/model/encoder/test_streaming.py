import pytest
import torch

from model.encoder.clip import Encoder
from model.encoder.streaming import embed_stream


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def test_a_row_has_the_same_bits_in_any_company(encoder: Encoder) -> None:
    pictures = torch.randn(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole, seconds = embed_stream(encoder, torch.split(pictures, 4), batch_size=4)
    assert whole.shape == (11, 256)
    assert seconds > 0
    torch.testing.assert_close(whole, encoder.embed_preprocessed(pictures), atol=1e-5, rtol=0)
    alone, _ = embed_stream(encoder, torch.split(pictures, 1), batch_size=4)
    assert torch.equal(alone, whole)
    other = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    moved, _ = embed_stream(encoder, torch.split(pictures[other], 3), batch_size=4)
    assert torch.equal(moved, whole[other])


def test_nothing_is_no_rows(encoder: Encoder) -> None:
    rows, seconds = embed_stream(encoder, [], batch_size=4)
    assert (tuple(rows.shape), seconds) == ((0, 256), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_in_bfloat16_rows_point_the_same_way(encoder: Encoder) -> None:
    pictures = torch.randn(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected, _ = embed_stream(encoder, [pictures], batch_size=16)
    there = Encoder(device="cuda", dtype=torch.bfloat16)
    rows, seconds = embed_stream(there, torch.split(pictures, 3), batch_size=4)
    assert seconds > 0
    assert there.identity == encoder.identity
    assert (rows * expected).sum(dim=1).min() > 0.99
