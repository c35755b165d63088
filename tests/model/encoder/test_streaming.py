import pytest
import torch

from model.encoder.clip import Encoder
from model.encoder.streaming import embed_stream


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def test_embed_stream_rows_are_bitwise_independent_of_batches(encoder: Encoder) -> None:
    images = torch.randn(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole, seconds = embed_stream(encoder, torch.split(images, 4), batch_size=4)
    assert whole.shape == (11, 256)
    assert seconds > 0
    torch.testing.assert_close(whole, encoder.embed_preprocessed(images), atol=1e-5, rtol=0)
    alone, _ = embed_stream(encoder, torch.split(images, 1), batch_size=4)
    assert torch.equal(alone, whole)
    other = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    moved, _ = embed_stream(encoder, torch.split(images[other], 3), batch_size=4)
    assert torch.equal(moved, whole[other])


def test_embed_stream_without_batches_returns_no_rows(encoder: Encoder) -> None:
    rows, seconds = embed_stream(encoder, [], batch_size=4)
    assert (tuple(rows.shape), seconds) == ((0, 256), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_embed_stream_on_cuda_in_bfloat16_is_close_to_cpu(encoder: Encoder) -> None:
    images = torch.randn(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected, _ = embed_stream(encoder, [images], batch_size=16)
    cuda_encoder = Encoder(device="cuda", dtype=torch.bfloat16)
    rows, seconds = embed_stream(cuda_encoder, torch.split(images, 3), batch_size=4)
    assert seconds > 0
    assert cuda_encoder.identity == encoder.identity
    assert (rows * expected).sum(dim=1).min() > 0.99
