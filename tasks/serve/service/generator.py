"""An open generator, as the service uses it."""

import copy
import dataclasses
from typing import Any

from model.encoder.clip import Encoder
from model.generation.backbone import Backbone
from model.generation.quality import resolve
from model.pipeline import KNNDiffusionPipeline
from tasks.serve.service.served import OpenDatabase


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpenModel:
    """An open generator with its encoder. A swap replaces it as a whole.

    Attributes:
        name: Name in responses, e.g. ``knn-diffusion/3`` or that of a bundled generator.
        version: Registered version, or None.
        generation: Number of swaps before this version.
        pipeline: The pipeline, without a database.
    """

    name: str
    version: int | None
    generation: int
    pipeline: KNNDiffusionPipeline

    @property
    def encoder(self) -> Encoder:
        """The encoder of queries and prompts."""
        return self.pipeline.encoder

    @property
    def backbone(self) -> Backbone:
        """The network with its scheduler and autoencoder."""
        return self.pipeline.backbone

    def with_database(self, opened: OpenDatabase) -> KNNDiffusionPipeline:
        """Return the pipeline with a database; the networks are shared. Raises ``ModelError`` for another encoder."""
        pipeline = copy.copy(self.pipeline)
        pipeline.swap_database(opened.database)
        return pipeline

    @property
    def edit_methods(self) -> list[str]:
        """Methods of edits that the generator supports, the default first; none if it was distilled to few steps."""
        backbone = self.backbone
        if self.pipeline.config.noise_levels is not None:
            return []
        if not backbone.starts_from_images:
            return ["local", "sdedit"]
        return ["flow", "local", *(["restore"] if backbone.restorer is not None else []), "sdedit"]

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings of a generation that names none, from a database with images."""
        config = self.pipeline.config
        preset = resolve("fast", self.backbone, neighbours_shown=True, has_images=True)
        return {
            "steps": config.num_inference_steps,
            "guidance": config.guidance_scale,
            "k": config.neighbours,
            "candidates": preset.candidates or config.candidates,
            "query": preset.query or config.query,
            "start": preset.start,
            "strength": preset.strength,
            "edit_method": next(iter(self.edit_methods), None),
        }
