"""References to the inputs of a training run, and checks that need no weights: a wrong path fails before a download."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

from infra.errors import EncoderMismatchError, InputError
from model.encoder.identity import EncoderIdentity
from model.saved_generator import BUNDLED_GENERATORS, pretrained_folder
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, Neighbours
from tasks.train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingInputs:
    """References to all artifacts that a training run reads."""

    images: ImageShards
    embeddings: EmbeddingShards
    database: DatabaseVersion
    neighbours: Neighbours

    def as_inputs(self) -> dict[str, dict[str, str]]:
        """Return the ``inputs`` entry of the generator's manifest."""
        return {field.name: getattr(self, field.name).as_input() for field in dataclasses.fields(self)}


def check_inputs(train: TrainConfig, encoder: EncoderIdentity | None = None) -> None:
    """Check the folders that the config names, and the encoder of ``start_from`` if ``encoder`` is given.

    Raises:
        InputError: There is no generator or autoencoder of that name.
        EncoderMismatchError: ``start_from`` was trained with another encoder.
    """
    if train.start_from is not None:
        _check_generator(train.start_from, encoder)
    if train.autoencoder is not None:
        _check_autoencoder(train.autoencoder)


def _check_generator(start_from: str, encoder: EncoderIdentity | None) -> None:
    index = pretrained_folder(start_from) / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"train.start_from is not a saved pipeline: {start_from}; give {' or '.join(BUNDLED_GENERATORS)}, "
            "or the folder of one"
        )
    try:
        trained_with = EncoderIdentity(**json.loads(index.read_text())["encoder_identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"train.start_from has a damaged {index.name}: {start_from}; save the pipeline again"
        ) from error
    if encoder is not None and not trained_with.same_space(encoder):
        raise EncoderMismatchError(
            f"encoders differ: {start_from} was trained with {trained_with}, the images were embedded by {encoder}; "
            "embed the images with the encoder of the generator, or leave start_from out"
        )


def _check_autoencoder(folder: str) -> None:
    from model.networks.latents import Autoencoder

    kinds = {kind.__name__ for kind in get_args(Autoencoder)}
    try:
        found = json.loads(Path(folder, "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found not in kinds:
        raise InputError(f"train.autoencoder is not an {' or '.join(sorted(kinds))}: {folder}; give the folder of one")
