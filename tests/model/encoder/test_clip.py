import dataclasses
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import model.encoder.clip
from model.encoder.clip import Encoder, Preprocessing
from model.encoder.identity import BUNDLED_ENCODER, EncoderIdentity
from model.errors import ModelError

BUNDLED_FOLDER = Path(model.encoder.clip.__file__).parent.parent / "pretrained" / "sticker-clip"
WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def apple() -> Image.Image:
    image = Image.new("RGB", (128, 128), WHITE)
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((24, 32, 104, 112), fill=(210, 30, 40))
    canvas.line((64, 34, 70, 14), fill=(110, 70, 30), width=6)
    canvas.ellipse((68, 12, 96, 28), fill=(60, 160, 60))
    return image


def square() -> Image.Image:
    image = Image.new("RGB", (128, 128), WHITE)
    ImageDraw.Draw(image).rectangle((24, 24, 104, 104), fill=(30, 80, 220))
    return image


def heart() -> Image.Image:
    image = Image.new("RGB", (128, 128), WHITE)
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((20, 24, 68, 72), fill=(220, 20, 50))
    canvas.ellipse((60, 24, 108, 72), fill=(220, 20, 50))
    canvas.polygon([(23, 58), (105, 58), (64, 112)], fill=(220, 20, 50))
    return image


def smile() -> Image.Image:
    image = Image.new("RGB", (128, 128), WHITE)
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((14, 14, 114, 114), fill=(255, 205, 60))
    for left in (40, 76):
        canvas.ellipse((left, 44, left + 12, 60), fill=(0, 0, 0))
    canvas.arc((36, 44, 92, 92), 20, 160, fill=(0, 0, 0), width=5)
    return image


IMAGES = [apple(), square(), heart(), smile()]
TEXTS = ["a red apple", "a blue square", "a red heart", "a smiling face"]


def changed_copy(folder: Path, *, mean: float | None = None, weight: float = 0.0) -> str:
    """Copy the bundled model as float32, optionally with other settings or weights; return its name."""
    folder.mkdir()
    settings = json.loads((BUNDLED_FOLDER / "open_clip_config.json").read_text())
    if mean is not None:
        settings["preprocess_cfg"]["mean"] = [mean] * 3
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    weights = {
        name: tensor.float() for name, tensor in load_file(BUNDLED_FOLDER / "open_clip_model.safetensors").items()
    }
    weights["visual.conv1.weight"][0, 0, 0, 0] += weight
    save_file(weights, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_encoder_matches_texts_and_images(encoder: Encoder) -> None:
    cosines = encoder.embed_texts(TEXTS) @ encoder.embed_images(IMAGES).T
    assert cosines.argmax(0).tolist() == [0, 1, 2, 3]
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]
    apple_to_apple, apple_to_square = cosines[0, :2].tolist()
    assert apple_to_apple > apple_to_square + 0.2


def test_encoder_returns_unit_float32_rows(encoder: Encoder) -> None:
    for rows in (encoder.embed_texts(TEXTS), encoder.embed_images(IMAGES)):
        assert (rows.shape, rows.dtype) == ((4, encoder.identity.dimension), torch.float32)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    assert encoder.identity.dimension == 256


def test_encoder_rows_are_independent_of_batches(encoder: Encoder) -> None:
    images, texts = encoder.embed_images(IMAGES), encoder.embed_texts(TEXTS)
    torch.testing.assert_close(encoder.embed_images(IMAGES, batch_size=3), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.embed_texts(TEXTS, batch_size=3), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.embed_texts(TEXTS[2:3]), texts[2:3], atol=1e-5, rtol=0)
    by_hand = encoder.embed_preprocessed(encoder.preprocessing(IMAGES))
    torch.testing.assert_close(by_hand, images, atol=1e-5, rtol=0)


def test_embed_images_accepts_any_size(encoder: Encoder) -> None:
    sizes = [(64, 64), (400, 400), (31, 31)]
    rows = encoder.embed_images([square().resize(size) for size in sizes])
    assert (rows @ rows[0]).min() > 0.9


def test_preprocessing_batch_equals_open_clip() -> None:
    images = [
        square().resize(size).convert(mode) for size, mode in (((64, 64), "L"), ((90, 40), "RGB"), ((31, 80), "P"))
    ]
    for mode in ("shortest", "longest", "squash"):
        for size in (64, (48, 64)):
            transform = open_clip.image_transform(size, is_train=False, resize_mode=mode)
            one_by_one = torch.stack([transform(image) for image in images])
            torch.testing.assert_close(Preprocessing.of(transform)(images), one_by_one, atol=0, rtol=0)


def test_encoder_without_inputs_returns_no_rows(encoder: Encoder) -> None:
    assert encoder.embed_images([]).shape == (0, 256)
    assert encoder.embed_texts([]).shape == (0, 256)


def test_embed_texts_over_context_length_truncates(encoder: Encoder) -> None:
    first, other = encoder.embed_texts(["red apple " * 200, "red apple " * 200 + "blue square"])
    torch.testing.assert_close(first, other)


def test_embed_texts_truncation_warning_uses_tokenizer_padding(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SigLIP pads with 1, which is also its end token; some tokenizers end with a class token."""

    def siglip(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[2] * min(15, len(text)) + [1] * (16 - min(15, len(text))) for text in texts])

    def with_class(texts: list[str]) -> torch.Tensor:
        return torch.cat([siglip(texts)[:, :-1], torch.full((len(texts), 1), 7)], dim=1)

    for tokenizer in (siglip, with_class):
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda _, chosen=tokenizer: chosen)
        encoder = Encoder()
        caplog.clear()
        encoder._warn_of_truncation(["short"], tokenizer(["short"]))
        assert caplog.text == ""
        encoder._warn_of_truncation(["short", "l" + "o" * 20 + "ng"], tokenizer(["short", "l" + "o" * 20 + "ng"]))
        assert caplog.messages == ["text 2 of 2 is longer than 14 tokens and was truncated"]


def test_embed_texts_bounds_cached_words_and_keeps_embeddings(
    monkeypatch: pytest.MonkeyPatch, encoder: Encoder
) -> None:
    texts = [f"a {word} owl" for word in ("crimson", "turquoise", "magenta", "ultramarine")]
    bounded = Encoder()
    cache = bounded._tokenizer.cache
    monkeypatch.setattr(model.encoder.clip, "_MAX_CACHED_WORDS", len(cache) + 2)
    for _ in range(2):
        assert torch.equal(bounded.embed_texts(texts), encoder.embed_texts(texts))
    assert len(cache) == model.encoder.clip._MAX_CACHED_WORDS


def test_identity_is_equal_across_instances(encoder: Encoder) -> None:
    again = Encoder()
    assert again.identity == encoder.identity
    assert torch.equal(again.embed_texts(TEXTS), encoder.embed_texts(TEXTS))
    assert encoder.identity.name == BUNDLED_ENCODER


def test_same_space_ignores_folder_and_file_precision(encoder: Encoder, tmp_path: Path) -> None:
    copy = Encoder(changed_copy(tmp_path / "copy")).identity
    assert copy.name != encoder.identity.name
    assert copy.same_space(encoder.identity)


def test_same_space_other_weights_or_preprocessing_is_false(encoder: Encoder, tmp_path: Path) -> None:
    weights = Encoder(changed_copy(tmp_path / "weights", weight=0.5)).identity
    assert weights.preprocess_digest == encoder.identity.preprocess_digest
    assert weights.weights_digest != encoder.identity.weights_digest
    assert not weights.same_space(encoder.identity)

    settings = Encoder(changed_copy(tmp_path / "preprocess", mean=0.1))
    assert settings.identity.weights_digest == encoder.identity.weights_digest
    assert settings.identity.preprocess_digest != encoder.identity.preprocess_digest
    assert not settings.identity.same_space(encoder.identity)
    one, other = settings.preprocessing([square()]), encoder.preprocessing([square()])
    assert (one - other).abs().max() > 0.1, "the changed settings were ignored"


def test_same_space_compares_digests_and_width_only() -> None:
    base = EncoderIdentity(name="a", weights_digest="0123456789", preprocess_digest="abcdefghij", dimension=8)
    assert base.same_space(dataclasses.replace(base, name="b"))
    for change in ({"weights_digest": "x"}, {"preprocess_digest": "x"}, {"dimension": 9}):
        assert not base.same_space(dataclasses.replace(base, **change)), change
    assert str(base) == "a (8-d, 01234567/abcdefgh)"


@pytest.mark.parametrize("name", ["NoSuchModel/openai", "ViT-B-32/no-such-weights", "local-dir:/nowhere"])
def test_encoder_unknown_model_raises(name: str) -> None:
    with pytest.raises(ModelError, match=r"(?s)cannot be loaded.*use an open_clip model or sticker-clip") as caught:
        Encoder(name)
    assert repr(name) in str(caught.value)


def test_encoder_name_without_weights_raises() -> None:
    with pytest.raises(ModelError, match="name without weights: 'ViT-B-32'; use ARCHITECTURE/WEIGHTS"):
        Encoder("ViT-B-32")
