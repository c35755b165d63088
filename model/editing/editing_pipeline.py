"""Editing with a pipeline: texts change images, without a mask."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from model.editing.config import FLOW_NEIGHBOURS, EditMethod, edit_config
from model.editing.edit import Generators, check_method, edit, fit_images, needs_source_tokens
from model.generation import arguments
from model.generation.backbone import is_discrete
from model.generation.base_pipeline import BasePipeline
from model.generation.batching import ProgressCallback
from model.generation.prompts import Prompts, one_for_each
from model.generation.sampling import embed_images

_RENAMED = {"images": "image", "prompts": "prompt"}


class EditingPipeline(BasePipeline):
    """Base of :class:`model.pipeline.KNNDiffusionPipeline`: edit images."""

    @torch.inference_mode()
    def edit(
        self,
        image: Image.Image | Sequence[Image.Image] | None = None,
        prompt: Prompts | None = None,
        *,
        strength: float | None = None,
        method: EditMethod | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        neighbours: int | None = None,
        retrieve: bool = True,
        neighbour_images: bool = True,
        on_progress: ProgressCallback | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Edit images by texts, without a mask: regenerate the parts that disagree with the text, and keep the rest.

        Args:
            image: One or several images. Transparency becomes white; the centre square is resized to ``side``.
            prompt: What the edited images should show: a text for all or one for each, or embeddings (B, D).
            strength: Noise level to start from, in (0, 1]; small values return the source. Default: 1; 0.925 for
                "flow".
            method: "flow" moves the whole image towards the text (continuous networks), "local" regenerates one
                region, "restore" needs a network trained for editing, "sdedit" is the baseline. Default: "local" for
                networks over codes or with ``largest_region``, else "flow".
            num_inference_steps: Number of sampling steps. Default: 12.
            generator: Source of the noise, on the CPU: one for all images, or one per image, which makes each
                result independent of the batch. Default: a random seed.
            neighbours: K. Default: 3 for "flow", otherwise the number used in training.
            retrieve: False hides the neighbours. Default: True.
            neighbour_images: False hides the images of the neighbours from a network that takes them. Otherwise text
                and source are each shown with those of their own neighbours. Default: True.
            on_progress: Called with (step, total steps) after each step, over all candidates and batches. Default:
                None.
            **options: Further fields of :class:`model.editing.config.EditConfig`, e.g. guidance_scale or candidates.

        Returns:
            One RGB image of ``side`` × ``side`` px for each image.

        Raises:
            ModelError: An argument is not valid, the generator does not support the method, memory is exhausted, or the
                results are NaN or infinite.
        """
        renamed = {name: options.pop(name) for name in _RENAMED if name in options}
        named = {"image": image, "prompt": prompt}
        image, prompt = arguments.renamed_arguments(_RENAMED, renamed, named).values()
        if method is None:
            method = "local" if is_discrete(self.transformer) or "largest_region" in options else "flow"
        config = edit_config(method, strength=strength, **({"steps": num_inference_steps} | options))
        backbone, flow = self.backbone, method == "flow"
        check_method(backbone, config)
        trained = self.config.trained_neighbours
        k = self.edit_neighbours(method) if neighbours is None else neighbours
        arguments.check_count("neighbours", k)
        sources = fit_images([image] if isinstance(image, Image.Image) else image or [], self.side)
        database = self.database if retrieve else None  # it may be swapped during the call
        targets = one_for_each(self.embed(prompt), len(sources), name="prompts", of="images")
        query = "both" if flow and retrieve else None
        shared: Any = {"database": database, "neighbour_images": neighbour_images}
        tokens = self.condition(targets, k, query, retrieve, **shared).tokens
        source_tokens = None
        if needs_source_tokens(config):
            embeddings = embed_images(self._embed_pixels, sources, backbone.device)
            k, query = (trained, "text") if flow else (k, None)  # the source's own embedding, as in training
            source_tokens = self.condition(embeddings, k, query, retrieve, **shared).tokens
        edited = edit(
            backbone, self._embed_pixels, sources, targets, tokens, source_tokens, config, generator, on_progress
        )
        return [Image.fromarray(pixels) for pixels in edited]

    def edit_neighbours(self, method: EditMethod) -> int:
        """Return the default number of neighbours of an edit."""
        trained = int(self.config.trained_neighbours)
        return min(FLOW_NEIGHBOURS, trained) if method == "flow" else trained
