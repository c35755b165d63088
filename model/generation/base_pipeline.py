"""Components of a pipeline: network, encoder and database, and the conditions built from them.

Legend: ``P`` prompts, ``K`` neighbours, ``D`` embedding width.
"""

import json
import logging
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, VQModel
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor

from model.diffusion.conditioning import MARKER_CHANNELS, append_image_tokens
from model.diffusion.few_steps import check_levels
from model.diffusion.guidance import FULL_INTERVAL
from model.diffusion.solver import Scheduler
from model.encoder.clip import Encoder, encoder_for
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.generation.arguments import check_defaults, required_database
from model.generation.backbone import Backbone, is_discrete, new_backbone
from model.generation.condition import Condition, build_condition
from model.generation.neighbour_images import encode_neighbours
from model.generation.prompts import Prompts, embed_prompts
from model.networks.build import AnyNetwork
from model.networks.compilation import compile_in_place
from model.networks.fused_attention import use_fused_attention
from model.networks.image_tokens import takes_images
from model.retrieval.searchable import Searchable
from model.saved_generator import check_weights

logger = logging.getLogger(__name__)


class BasePipeline(DiffusionPipeline):
    """Base of :class:`model.pipeline.KNNDiffusionPipeline`: components, database, and conditions."""

    _optional_components = ["scheduler", "vae", "guide"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        transformer: AnyNetwork,
        scheduler: Scheduler | None = None,
        vae: AutoencoderKL | VQModel | None = None,
        encoder_identity: dict[str, Any] | None = None,
        neighbours: int = 10,
        trained_neighbours: int | None = None,
        candidates: int = 1,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, ...] | list[float] = FULL_INTERVAL,
        num_inference_steps: int = 25,
        query: str = "text",
        prediction: str = "velocity",
        truncation: float = 0.86,
        guide: AnyNetwork | None = None,
        noise_levels: list[float] | None = None,
    ) -> None:
        """Combine the components. ``neighbours`` and the arguments after it are defaults; a call may override most.

        Args:
            transformer: The network: velocities of pixels or latents, or logits of codes.
            scheduler: Any flow-matching scheduler of diffusers. Required for continuous networks, unused for discrete
                ones.
            vae: The autoencoder of the network's latents or codes. Default: None, for networks over pixels.
            encoder_identity: Fields of :class:`model.encoder.identity.EncoderIdentity`. Required.
            neighbours: K. Default: 10.
            trained_neighbours: Maximum number of neighbours shown in training. Default: ``neighbours``.
            candidates: Images generated for each image that is returned. Default: 1.
            guidance_scale: 1 is the conditional model itself. Default: 2.
            guidance_interval: Noise levels σ at which guidance acts (continuous networks). Edits do not use it.
                Default: (0, 1), all.
            num_inference_steps: Number of sampling steps. Default: 25.
            query: Embedding in the query's slot: "text", "mean", "both" or "none". Default: "text".
            prediction: Output of a continuous network: "velocity" or "sample". Default: "velocity".
            truncation: Probability mass kept per code (discrete networks). Default: 0.86.
            guide: A smaller or earlier version of a continuous network, to guide by. Edits do not use it. Default:
                None, the network itself.
            noise_levels: The levels of a network that was distilled to few steps; their number replaces
                ``num_inference_steps``. Default: None, for other networks.

        Raises:
            ModelError: A component that the network needs is missing, the components do not match, or a default is not
                valid.
        """
        super().__init__()
        if noise_levels is not None:
            check_levels(noise_levels)
        if encoder_identity is None:  # optional only because diffusers takes arguments without a default for modules
            raise ModelError(
                "encoder_identity is missing; a generator only works with the encoder that it was trained with"
            )
        if scheduler is None and not is_discrete(transformer):
            raise ModelError("the scheduler is missing: a continuous network needs one; pass new_scheduler()")
        use_fused_attention(transformer)
        if guide is not None:
            use_fused_attention(guide)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, guide=guide)
        self.register_to_config(
            encoder_identity=dict(encoder_identity),
            neighbours=neighbours,
            trained_neighbours=trained_neighbours or neighbours,
            candidates=candidates,
            guidance_scale=guidance_scale,
            guidance_interval=list(guidance_interval),
            num_inference_steps=num_inference_steps if noise_levels is None else len(noise_levels),
            query=query,
            prediction=prediction,
            truncation=truncation,
            noise_levels=noise_levels,
        )
        check_defaults(self.config)
        self._identity = EncoderIdentity(**encoder_identity)
        if (width := self._new_backbone().condition_channels - MARKER_CHANNELS) != self._identity.dimension:
            raise ModelError(
                f"the network takes embeddings of width {width}, but the encoder is {self._identity}; "
                "name the encoder that the network was trained with"
            )
        self._encoder: Encoder | None = None
        self._database: Searchable | None = None
        self._without_images: set[str] = set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a pipeline as diffusers does, but fail for incomplete weights instead of logging a warning.

        Raises ``ModelError`` if a component's weights do not match its config or are not finite.
        """
        pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **options)
        for name, part in pipeline.components.items():
            if isinstance(part, ModelMixin) and name not in options:
                check_weights(Path(part.config._name_or_path), part)
        return pipeline

    @classmethod
    def open(cls, folder: Path | str, database: Searchable | None = None) -> Self:
        """Load a saved pipeline in float32 and plug in a database.

        Raises ``ModelError`` if the folder has no valid pipeline, or if another encoder made the database.
        """
        bars = diffusers_logging.is_progress_bar_enabled()
        diffusers_logging.disable_progress_bar()  # the files are few and small
        try:
            pipeline: Self = cls.from_pretrained(
                str(folder), dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
            )
        except Exception as error:  # diffusers and safetensors raise OSError, ValueError and types of their own
            raise ModelError(f"cannot load a generator: {folder} ({error}); train or download it again") from error
        finally:
            if bars:
                diffusers_logging.enable_progress_bar()
        if database is not None:
            pipeline.swap_database(database)
        return pipeline

    @property
    def database(self) -> Searchable:
        """The database in use. Raises ``ModelError`` if there is none."""
        return required_database(self._database)

    def swap_database(self, database: Searchable) -> None:
        """Use ``database`` from the next call on. Raises ``ModelError`` if another encoder made it."""
        if not database.encoder.same_space(self._identity):
            raise ModelError(
                f"database {database.name} was made with {database.encoder}, but this generator was trained with "
                f"{self._identity}; rebuild the database with that encoder"
            )
        self._database = database

    @property
    def identity(self) -> EncoderIdentity:
        """The encoder that the network was trained with."""
        return self._identity

    @property
    def encoder(self) -> Encoder:
        """The encoder of the prompts, loaded at first use and checked against the one trained with."""
        if self._encoder is None:
            self._encoder = encoder_for(self._identity, device=self.device)
        return self._encoder

    @property
    def backbone(self) -> Backbone:
        """The network with its scheduler and autoencoder, in evaluation mode."""
        self.transformer.eval()
        if self.guide is not None:
            self.guide.eval()
        return self._new_backbone()

    @property
    def side(self) -> int:
        """Width and height of the images, in px."""
        return self._new_backbone().side

    @property
    def has_images(self) -> bool:
        """True if there is a database whose images can be read, to start from them or to show them to the network."""
        return self._database is not None and self._database.has_images

    @property
    def starts_from_images(self) -> bool:
        """True if a call accepts a ``start`` other than noise."""
        return self._new_backbone().starts_from_images

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Save as diffusers does, without the paths that components were loaded from."""
        for part in (self, *self.components.values()):
            if isinstance(config := getattr(part, "_internal_dict", None), dict):
                part._internal_dict = FrozenDict({key: config[key] for key in config if key != "_name_or_path"})
        super().save_pretrained(save_directory, *args, **options)

    def to_json_string(self) -> str:
        """Serialise the config without a guide or noise levels that are not set, as earlier versions wrote it."""
        config = json.loads(super().to_json_string())
        unset = {"guide": [None, None], "noise_levels": None}
        kept = {name: value for name, value in config.items() if name not in unset or value != unset[name]}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"

    def compile(self) -> None:
        """Compile the network in place, to generate many images on a GPU. Call it after ``to``.

        A transformer is compiled at its first call, in about half a minute, and again for each new batch size or number
        of neighbours. Guidance in an interval has two batch sizes per call. Compilation of a U-Net takes minutes.
        """
        compile_in_place(self.transformer)
        if self.guide is not None:
            compile_in_place(self.guide)

    def embed(self, prompts: Prompts) -> Tensor:
        """Embed prompts as unit rows (P, D) on the CPU. Raises ``ModelError`` for an empty text or image."""
        return embed_prompts(prompts, lambda: self.encoder, self._identity.dimension)

    def condition(
        self,
        embeddings: Tensor,
        k: int,
        query: str | None = None,
        retrieve: bool = True,
        *,
        database: Searchable | None = None,
        neighbour_images: bool = True,
    ) -> Condition:
        """Retrieve the neighbours of embeddings (P, D) and build the condition tokens.

        If the network takes images of neighbours and the database stores them, their tokens are appended.

        Args:
            embeddings: (P, D) unit rows on the CPU.
            k: Number of neighbours, K.
            query: Embedding in the query's slot. Default: the generator's; without retrieval "text".
            retrieve: False hides the neighbours. Default: True.
            database: Database to search. Default: that of the pipeline.
            neighbour_images: False hides the images of the neighbours. Default: True.

        Raises:
            ModelError: ``query`` is not valid, or there is no database to search.
        """
        if retrieve and database is None:
            database = self.database
        condition = build_condition(
            embeddings,
            k,
            query or (self.config.query if retrieve else "text"),
            database=database if retrieve else None,
            dimension=self._identity.dimension,
            trained_neighbours=self.config.trained_neighbours,
        )
        network, hits = self.transformer, condition.hits
        if not (neighbour_images and takes_images(network)) or hits is None or database is None:
            return condition
        if not database.has_images:
            self._log_without_images(database.name)
            return condition
        images = encode_neighbours(network, hits, database)
        return condition._replace(tokens=append_image_tokens(condition.tokens, images))

    def _log_without_images(self, database: str) -> None:
        if database not in self._without_images:
            self._without_images.add(database)
            logger.warning(
                "database %s has no readable images; the generator uses the embeddings of neighbours alone", database
            )

    def _embed_pixels(self, pixels: NDArray[np.uint8]) -> Tensor:
        return self.encoder.embed_pixels(pixels)

    def _new_backbone(self) -> Backbone:
        first, last = self.config.guidance_interval
        return new_backbone(
            self.transformer,
            vae=self.vae,
            scheduler=self.scheduler,
            prediction=self.config.prediction,
            guidance_interval=(float(first), float(last)),
            truncation=self.config.truncation,
            guide=self.guide,
            noise_levels=self.config.noise_levels,
        )
