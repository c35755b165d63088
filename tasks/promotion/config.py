"""Limits of the promotion gates."""

import dataclasses
import json

from infra.errors import ConfigError, IntegrityError

GATES_TAG = "promotion.gates"
"""Tag of a database version: the gates of its domain when it was registered, as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseGates:
    """Limits for a database. None disables a gate.

    Attributes:
        recall_image: Minimum recall@10 of image queries, in [0, 1].
        recall_text: Minimum recall@10 of text queries, in [0, 1]. Not applied if there were no text queries.
        lost_rows: Maximum share of the champion's rows that the version lacks although they were not taken down.
        failed_downloads: Maximum share of listed images that could not be downloaded.
        drift: Maximum cosine distance between the mean embeddings of the champion and the version, in [0, 2].
    """

    recall_image: float | None = 0.9
    recall_text: float | None = 0.9
    lost_rows: float | None = 0.01
    failed_downloads: float | None = 0.5
    drift: float | None = 0.1

    def __post_init__(self) -> None:
        """Validate the fields."""
        _require_ranges(self, {"drift": 2.0}, default=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorGates:
    """Limits for a generator. None disables a gate.

    ``clip_score``, ``distance`` and ``copy_rate`` compare the version with the champion by a paired bootstrap. Each
    limits how much worse the version may be at the unfavourable end of the interval of the difference.

    Attributes:
        neighbour_loss: Maximum loss of CLIP score caused by the neighbours. 0 requires that they do not lower it.
        clip_score: Maximum loss of CLIP score against the champion.
        distance: Maximum increase of the Fréchet distance against the champion.
        copy_rate: Maximum increase of the copy rate against the champion, in [0, 1].
        samples: Number of images that each generator samples for the comparison.
        resamples: Resamples of the bootstrap.
        seed: Seed of the noise that both generators start from.
    """

    neighbour_loss: float | None = 0.0
    clip_score: float | None = 0.01
    distance: float | None = 0.05
    copy_rate: float | None = 0.05
    samples: int = 256
    resamples: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the fields."""
        _require_ranges(self, {"distance": 8.0, "clip_score": 2.0, "neighbour_loss": 2.0}, default=1.0)
        if self.samples < 8 or self.resamples < 1:
            raise ConfigError(
                f"samples or resamples are too few: {self.samples}, {self.resamples}; give at least 8 and 1"
            )

    @property
    def compares(self) -> bool:
        """Return True if a gate compares the version with the champion."""
        return any(limit is not None for limit in (self.clip_score, self.distance, self.copy_rate))


def gates_to_tag(gates: DatabaseGates) -> str:
    """Return the gates as the value of their tag."""
    return json.dumps(dataclasses.asdict(gates))


def gates_from_tag(text: str) -> DatabaseGates:
    """Return the gates from the value of their tag. Raises ``IntegrityError`` if the value is invalid."""
    try:
        return DatabaseGates(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise IntegrityError(f"the tag {GATES_TAG} is unusable: {error}; register the version again") from None


def _require_ranges(gates: DatabaseGates | GeneratorGates, highest: dict[str, float], *, default: float) -> None:
    for field in dataclasses.fields(gates):
        value = getattr(gates, field.name)
        upper = highest.get(field.name, default)
        if value is None or isinstance(field.default, int):
            continue
        if isinstance(value, bool | str) or not 0 <= value <= upper:
            raise ConfigError(f"{field.name} is out of range: {value}; give a value in [0, {upper:g}], or None")


AT_ONCE = DatabaseGates(recall_image=None, recall_text=None, lost_rows=None, failed_downloads=None, drift=None)
"""Gates at registration: all disabled, because the index stage has already required its target recall."""
