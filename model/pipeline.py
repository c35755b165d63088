"""KNNDiffusionPipeline: a diffusers pipeline that retrieves from an image database.

Legend: ``P`` prompts, ``M`` images per prompt, ``K`` neighbours, ``D`` embedding width, ``S`` side.

    prompt --encoder--> query (D) --database--> neighbours (K, D) --tokens--> network, guided --> image

The network is a transformer or a U-Net over pixels or latents (flow matching), or a transformer over codes
(VQ-Diffusion); the saved folder records which. The database is not part of a saved pipeline. Any database of the same
encoder can be plugged in, and swapped between calls; a call uses the database that it started with.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.utils import BaseOutput, replace_example_docstring
from PIL import Image
from torch import Tensor

from model.configs import Prediction
from model.diffusion.conditioning import interpolate_tokens
from model.diffusion.solver import Scheduler, new_scheduler
from model.editing.editing_pipeline import EditingPipeline
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.generation import arguments
from model.generation.arguments import Images, OutputType
from model.generation.backbone import is_discrete
from model.generation.batching import ProgressCallback, is_positive_int
from model.generation.condition import QuerySlot
from model.generation.prompts import Prompt, Prompts, one_for_each
from model.generation.quality import Quality, resolve
from model.generation.sampling import SamplingRequest, generate, initial_noise, rows_not_to_copy
from model.generation.start import Reference, Start, checked_layout
from model.networks.build import AnyNetwork
from model.retrieval.searchable import Hits

_RENAMED = {"prompts": "prompt", "negative_prompts": "negative_prompt", "callback": "on_progress"}

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from infra.settings import Settings
        >>> from model.pipeline import KNNDiffusionPipeline
        >>> from model.saved_generator import BUNDLED_GENERATOR, pretrained_folder
        >>> from tasks.serve.load import load_database

        >>> database = load_database("birds", Settings())
        >>> pipe = KNNDiffusionPipeline.open(pretrained_folder(BUNDLED_GENERATOR), database)
        >>> generator = torch.Generator().manual_seed(0)
        >>> image = pipe("an owl", guidance_scale=3.0, generator=generator).images[0]
        >>> image.save("owl.png")
        ```
"""


@dataclasses.dataclass
class KNNDiffusionOutput(BaseOutput):
    """Output of :class:`KNNDiffusionPipeline`.

    Attributes:
        images: P·M images, prompt after prompt, in the requested output type.
        hits: The neighbours of each prompt, or None without retrieval.
    """

    images: Images
    hits: Hits | None


class KNNDiffusionPipeline(EditingPipeline):
    """Pipeline for image generation and editing from texts, images or embeddings and their neighbours in a database."""

    @torch.inference_mode()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        neighbours: int | None = None,
        candidates: int | None = None,
        query: QuerySlot | None = None,
        retrieve: bool = True,
        neighbour_images: bool = True,
        quality: Quality | None = None,
        start: Start | None = None,
        strength: float | None = None,
        reference: Reference = "none",
        shared_noise: bool = False,
        between: int | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        on_progress: ProgressCallback | None = None,
        **renamed: Any,
    ) -> KNNDiffusionOutput | tuple[Images, Hits | None]:
        """Generate images.

        Args:
            prompt: A text or an image, several of them in any mix, or embeddings (P, D) of the encoder.
            negative_prompt: What to push away from, one for all prompts or one for each. Needs a ``guidance_scale``
                above 1. Default: None, the null condition.
            num_images_per_prompt: M, generated from different noise. Default: 1.
            num_inference_steps: Number of sampling steps; fixed for a generator that was distilled to few. Default: the
                generator's.
            guidance_scale: 1 is the conditional model itself; larger values follow the prompt more strongly. Default:
                the generator's.
            height: Height of the images in px; only ``side`` is supported. Default: ``side``.
            width: Width of the images in px; only ``side`` is supported. Default: ``side``.
            generator: Source of the noise, on the CPU. The same seed gives the same images in any batch. Default: a
                random seed.
            latents: Noise to start from instead of ``generator``: (P·M·candidates, C, s, s) standard normal, or
                (P·M·candidates, steps, n) uniform in [0, 1) for networks over codes. Default: None.
            neighbours: K; it may differ from training. Default: the generator's.
            candidates: Images generated for each image that is returned; the cost is proportional. The one whose
                embedding is closest to the first condition token (query slot) is returned. With
                ``start="neighbour"``, copies of the neighbours are passed over. Default: the generator's.
            query: Embedding in the first condition token (query slot): "text" (the prompt's), "mean" (of the
                neighbours), "both" (the mean of the two) or "none". Default: the generator's; without retrieval "text".
            retrieve: False hides the neighbours, the ablation without retrieval. Default: True.
            neighbour_images: False hides the images of the neighbours from a network that takes them, the ablation with
                embeddings alone. Interpolations always hide them. Default: True.
            quality: "fast" or "best", a preset for ``candidates``, ``query``, ``start`` and ``strength``, which given
                arguments override. From a database without images it starts from noise. Default: None, no preset.
            start: "noise", "neighbour" (a stored image, chosen at random from up to three nearest images with similar
                scores), or an image for all prompts or one for each. Needs a continuous generator. Default: "noise".
            strength: Share of noise that is added to the start, in (0, 1]; small values return the start. Default: 0.8.
            reference: "neighbour" shows a stored image, chosen like the start, to the network while the noise level is
                above 0.85. Needs a network trained for editing, and a start from noise or a ``strength`` above 0.85.
                Default: "none".
            shared_noise: True starts all images from the same noise, and disables ``candidates``. Default: False.
            between: Number of images that interpolate two prompts, ends included; see :meth:`interpolate`. Default:
                None.
            output_type: "pil", "np" (float32 (P·M, S, S, 3) in [0, 1]) or "pt" (float32 (P·M, 3, S, S) in [0, 1]).
                Default: "pil".
            return_dict: False returns a tuple (images, hits). Default: True.
            on_progress: Called with (step, total steps) after each step, over all batches. Default: None.
            **renamed: Old names of arguments: ``prompts``, ``negative_prompts``, ``callback``. Deprecated.

        Examples:

        Returns:
            :class:`KNNDiffusionOutput`: P·M images, prompt after prompt, and the neighbours of each prompt.

        Raises:
            ModelError: An argument is not valid, memory is exhausted, or the results are NaN or infinite.
        """  # noqa: D414 - the decorator fills in the examples
        named = {"prompt": prompt, "negative_prompt": negative_prompt, "on_progress": on_progress}
        prompt, negative_prompt, on_progress = arguments.renamed_arguments(_RENAMED, renamed, named).values()
        database = self._database if retrieve else None  # it may be swapped during the call
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        preset = resolve(
            quality,
            self._new_backbone(),
            neighbours_shown=retrieve and between is None,
            has_images=quality is not None and database is not None and database.has_images,  # it reads an image
            candidates=candidates,
            query=query,
            start=start,
            strength=strength,
        )
        k = config.neighbours if neighbours is None else neighbours
        choices = config.candidates if preset.candidates is None else preset.candidates
        counts = {"num_images_per_prompt": num_images_per_prompt, "num_inference_steps": steps}
        for name, value in (counts | {"neighbours": k, "candidates": choices}).items():
            arguments.check_count(name, value)
        arguments.check_steps(steps, config.noise_levels)
        arguments.check_finite("guidance_scale", scale)
        arguments.check_choice("output_type", output_type, ("pil", "np", "pt"))
        arguments.check_size(self.side, height, width)
        if negative_prompt is not None and scale <= 1:
            raise ModelError(f"guidance_scale is too small for a negative_prompt: {scale}; give a value above 1")
        layout = checked_layout(
            self._new_backbone(),
            preset.start,
            preset.strength,
            reference,
            retrieve=retrieve,
            between=between is not None,
        )
        shared_noise = shared_noise or between is not None
        choices = 1 if shared_noise else choices
        repeats = num_images_per_prompt * choices

        if retrieve:
            database = arguments.required_database(database)
        embeddings = self.embed(prompt)
        show = neighbour_images and between is None
        condition = self.condition(embeddings, k, preset.query, retrieve, database=database, neighbour_images=show)
        tokens = condition.tokens if between is None else _interpolate(condition.tokens, between)
        negative = None
        if negative_prompt is not None:
            away = one_for_each(self.embed(negative_prompt), len(tokens), name="negative prompts", of="prompts")
            negative = self.condition(
                away, k, preset.query, retrieve, database=database, neighbour_images=show
            ).tokens.repeat_interleave(repeats, dim=0)
        tokens = tokens.repeat_interleave(repeats, dim=0)
        target = embeddings if condition.query is None else condition.query
        backbone = self.backbone
        noise = initial_noise(backbone, latents, len(tokens), steps, generator, shared_noise)
        start_images, reference_images = layout.images(embeddings, database, noise, self.side)
        request = SamplingRequest(
            tokens=tokens,
            targets=target.repeat_interleave(num_images_per_prompt, dim=0),
            noise=noise,
            candidates=choices,
            neighbours=rows_not_to_copy(condition.hits, num_images_per_prompt) if preset.start == "neighbour" else None,
            negative=negative,
            guidance_scale=scale,
            steps=steps,
            on_progress=on_progress,
            start=start_images,
            strength=layout.strength,
            reference=reference_images,
        )
        images = arguments.to_output(generate(backbone, self._embed_pixels, request), output_type)
        return KNNDiffusionOutput(images=images, hits=condition.hits) if return_dict else (images, condition.hits)

    def vary(
        self,
        image: Image.Image | Sequence[Image.Image],
        strength: float | None = None,
        *,
        prompt: Prompts | None = None,
        **options: Any,
    ) -> KNNDiffusionOutput:
        """Generate variations of images, from the images themselves with noise added.

        Args:
            image: One or several images. Transparency becomes white; the centre square is resized to ``side``.
            strength: Share of noise that is added, in (0, 1]; small values return the image. Default: 0.8.
            prompt: What the variations should show. Default: the images themselves.
            **options: Further arguments of a call, e.g. num_images_per_prompt or generator.

        Returns:
            :class:`KNNDiffusionOutput`, as returned by ``__call__``.

        Raises:
            ModelError: There is no image, or an argument is not valid for a call.
        """
        images = [image] if isinstance(image, Image.Image) else list(image)
        if not images or not all(isinstance(one, Image.Image) for one in images):
            raise ModelError("there is no image to vary; give at least one PIL image")
        output: KNNDiffusionOutput = self(
            images if prompt is None else prompt, start=images, strength=strength, **options
        )
        return output

    def interpolate(self, first: Prompt, second: Prompt, count: int = 8, **options: Any) -> KNNDiffusionOutput:
        """Generate ``count`` images between two prompts, ends included, from the same noise.

        The neighbours are interpolated like the queries, rank by rank. A search for each intermediate query would give
        runs of nearly equal images with jumps between them. The hits are those of the two prompts.

        Args:
            first: A text or an image.
            second: A text or an image.
            count: Number of images, at least 2. Default: 8.
            **options: Further arguments of a call.

        Returns:
            :class:`KNNDiffusionOutput` with ``count`` images.

        Raises:
            ModelError: ``count`` is below 2, or an argument is not valid for a call.
        """
        output: KNNDiffusionOutput = self([first, second], between=count, **options)
        return output


def new_pipeline(
    network: AnyNetwork,
    encoder: EncoderIdentity,
    *,
    prediction: Prediction = "velocity",
    vae: AutoencoderKL | VQModel | None = None,
    scheduler: Scheduler | None = None,
    **defaults: Any,
) -> KNNDiffusionPipeline:
    """Return a pipeline around a trained network.

    Args:
        network: The network.
        encoder: The encoder that it was trained with.
        prediction: Output of a continuous network. Default: "velocity".
        vae: The autoencoder of the network's latents or codes. Default: None, for networks over pixels.
        scheduler: Scheduler of a continuous network. Default: :func:`model.diffusion.solver.new_scheduler`.
        **defaults: Defaults of the pipeline: neighbours, guidance_scale, query, ….
    """
    return KNNDiffusionPipeline(
        transformer=network,
        scheduler=None if is_discrete(network) else scheduler or new_scheduler(),
        vae=vae,
        encoder_identity=dataclasses.asdict(encoder),
        prediction=prediction,
        **defaults,
    )


def _interpolate(tokens: Tensor, count: int) -> Tensor:
    if len(tokens) != 2:
        raise ModelError(f"wrong number of prompts to interpolate: {len(tokens)}; give two")
    if not is_positive_int(count) or count < 2:
        raise ModelError(f"too few images for an interpolation: {count}; give at least 2, because it has two ends")
    return interpolate_tokens(tokens, count)
