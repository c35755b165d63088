"""What must agree for two embeddings to be comparable; apart from the encoder, for most workers never load one."""

import dataclasses

EMBEDDED = "sticker-clip"
"""Name of the encoder that ships with this package."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncoderIdentity:
    """Of the encoder that made embeddings. ``name`` is for people; the digests decide."""

    name: str
    weights_digest: str
    preprocess_digest: str
    dimension: int

    def same_space(self, other: "EncoderIdentity") -> bool:
        """Whether embeddings of both may be compared."""
        return dataclasses.replace(self, name="") == dataclasses.replace(other, name="")

    def __str__(self) -> str:
        """Name, width and the short digests, as error messages show it."""
        return f"{self.name} ({self.dimension}-d, {self.weights_digest[:8]}/{self.preprocess_digest[:8]})"
