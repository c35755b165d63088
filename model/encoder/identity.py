"""Identity of an encoder's embedding space. Separate from the encoder, which most workers never load."""

import dataclasses

BUNDLED_ENCODER = "sticker-clip"
"""Name of the encoder that ships with this package."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncoderIdentity:
    """Identity of the encoder of embeddings. ``name`` is for display; the digests and the width are compared."""

    name: str
    weights_digest: str
    preprocess_digest: str
    dimension: int

    def same_space(self, other: "EncoderIdentity") -> bool:
        """Return True if embeddings of both encoders are comparable."""
        return dataclasses.replace(self, name="") == dataclasses.replace(other, name="")

    def __str__(self) -> str:
        """Return name, width and short digests, as shown in error messages."""
        return f"{self.name} ({self.dimension}-d, {self.weights_digest[:8]}/{self.preprocess_digest[:8]})"
