"""Embed stage: image shards to CLIP embeddings in clip-retrieval's layout, one output shard per input shard."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from infra import artifacts, compute, storage
from infra.errors import ConfigError, StageError
from model.encoder.identity import BUNDLED_ENCODER, EncoderIdentity
from tasks.embed.shared import DECODER_DIED, SECONDS, WorkerConfig
from tasks.references.domain_folder import DomainFolder
from tasks.references.rows import PART
from tasks.references.types import EmbeddingShards, ImageShards, StageResult, encoder_of
from tasks.stage import run_shards, run_stage, stage_task, sum_outcomes

if TYPE_CHECKING:  # only workers import torch and open_clip, which takes seconds
    from tasks.embed.worker import EmbedShard

_LOCAL = "local-dir:"
_MAX_DECODERS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Settings of the embedding stage.

    Attributes:
        encoder: Encoder: sticker-clip, which ships with the package; an open_clip model as ARCHITECTURE/WEIGHTS;
            hf-hub:ORG/NAME; or local-dir:FOLDER.
        batch_size: Images per batch.
        workers: Number of workers. Default: one per core of the cluster, or as many as fit on its GPUs.
        gpus_per_worker: GPUs per worker. 0 embeds on the CPU in float32, more on CUDA in bfloat16. With 0.5, two
            workers share a GPU.
        decoders: Decoding processes per worker. Default: one on the CPU, and with GPUs the worker's share of the
            cores.
        max_lost_fraction: Share of shards that may fail before the stage fails.
    """

    encoder: str = BUNDLED_ENCODER
    batch_size: Annotated[int, Ge(1)] = 64
    workers: int | None = None
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    decoders: int | None = None
    max_lost_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.01

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for values out of range, and make the path of a local encoder absolute."""
        if self.batch_size < 1 or (self.decoders is not None and self.decoders < 1):
            raise ConfigError(f"batch_size or decoders is below 1: {self.batch_size}, {self.decoders}; give at least 1")
        if self.gpus_per_worker < 0:
            raise ConfigError(f"gpus_per_worker is negative: {self.gpus_per_worker}; use 0 for the CPU, or 0.5, 1, …")
        if self.encoder.startswith(_LOCAL):
            folder = storage.absolute(self.encoder.removeprefix(_LOCAL))
            object.__setattr__(self, "encoder", _LOCAL + folder)


@stage_task(name="embed")
def embed(
    images: ImageShards,
    folder: DomainFolder,
    config: EmbedConfig,
    *,
    previous: EmbeddingShards | None = None,
    verify: bool = False,
) -> StageResult[EmbeddingShards]:
    """Embed every image of ``images`` into ``<folder>/embeddings/<key>``.

    Embeddings in ``previous`` are reused if the same encoder made them with the same settings. A shard with an
    unchanged tar is reused as a whole. If the tar was rewritten, the rows of the remaining images are copied. Content
    and key of the output are the same with and without ``previous``.

    There is one exception: ``previous`` may have embeddings of only a part of a tar, as the subset of a database does.
    Then only that part is embedded, with any encoder.

    Args:
        images: Image shards to embed.
        folder: Folder of the domain.
        config: Settings of the stage.
        previous: Version whose rows are reused. Default: None.
        verify: Check the digests of committed shards, and embed damaged shards again. Default: False.

    Raises:
        ModelError: The encoder does not exist.
        StageError: No image could be decoded, too many shards failed, or the encoder changed during the stage.
    """
    stage = artifacts.ArtifactBuilder(
        folder.uri, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=_settings(config)
    )

    def make() -> artifacts.Manifest:
        sources = images.manifest().shards
        earlier = _reusable(previous, config, {shard.name for shard in sources}) if previous else {}
        partial_shards = _partial_shards(previous, sources) if previous else {}
        reused = {
            shard.name: earlier[shard.name]
            for shard in sources
            if shard.name in earlier and earlier[shard.name].info.get("source") == shard.file(".tar").sha256
        }
        items = [
            (shard.name, (shard, earlier.get(shard.name), partial_shards.get(shard.name)))
            for shard in sources
            if shard.name not in reused
        ]
        settings = (images.uri, stage.uri, _worker_config(config), folder.cache)
        embedded, lost = run_shards(
            stage, items, _build_worker, settings, max_lost_fraction=config.max_lost_fraction, **_resources(config)
        )
        done = [*reused.values(), *embedded]
        outcomes = sum_outcomes(done)
        if not outcomes.get("success"):
            raise StageError(f"no image could be decoded: {images.uri} ({outcomes}); check its tar files")
        first, *others = (EncoderIdentity(**shard.info["encoder"]) for shard in done)
        if not all(first.same_space(other) for other in others):
            raise StageError(
                f"{config.encoder} changed while {stage.uri} was being written; delete that folder and run again"
            )
        # A reused shard may record the same encoder under another name.
        identity = {"encoder": {**dataclasses.asdict(first), "name": config.encoder}}
        info = {"outcomes": outcomes, "lost_shards": lost, "shards_taken_over": len(reused), **_sum_info(embedded)}
        return stage.commit(done, identity=identity, info=info)

    return run_stage(stage, EmbeddingShards, make, note=_note, verify=verify, repairs=True)


def _settings(config: EmbedConfig) -> dict[str, Any]:
    """Return the settings that affect the rows. The batch size is one: it may change the last bit of a float16 row."""
    precision = "bfloat16" if config.gpus_per_worker else "float32"
    return {"encoder": config.encoder, "batch_size": config.batch_size, "precision": precision}


def _worker_config(config: EmbedConfig) -> WorkerConfig:
    cuda = config.gpus_per_worker > 0
    decoders = config.decoders or (_decoders_per_gpu_worker(config.gpus_per_worker) if cuda else 1)
    return WorkerConfig(encoder=config.encoder, batch_size=config.batch_size, cuda=cuda, decoders=decoders)


def _resources(config: EmbedConfig) -> dict[str, Any]:
    """Return the resources of the workers. Each embeds two shards at once: one is read while the other is computed."""
    cores = 1 + _worker_config(config).decoders if config.gpus_per_worker else 1
    return {
        "actors": config.workers or compute.cpus(),
        "cpus_per_actor": cores,
        "gpus_per_actor": config.gpus_per_worker,
        "concurrency": 2,
    }


def _decoders_per_gpu_worker(gpus_each: float) -> int:
    """Return a GPU worker's share of the cores, minus one for the worker itself."""
    workers = max(1, int(compute.gpus() / gpus_each))
    return max(1, min(_MAX_DECODERS, compute.cpus() // workers - 1))


def _reusable(previous: EmbeddingShards, config: EmbedConfig, names: set[str]) -> dict[str, artifacts.Shard]:
    """Return the shards of ``previous`` with these names, by name; none if ``config`` would give different rows."""
    manifest = previous.manifest()
    settings = {name: value for name, value in _settings(config).items() if name != "encoder"}
    shards = {shard.name: shard.reused_from(previous.uri) for shard in manifest.shards if shard.name in names}
    if not shards or any(manifest.config.get(name) != value for name, value in settings.items()):
        return {}
    # The weights under a name may have changed; only loading them shows it.
    encoder: EncoderIdentity = compute.run(_identity_of, config.encoder)
    return shards if encoder.same_space(encoder_of(manifest)) else {}


def _partial_shards(previous: EmbeddingShards, sources: Sequence[artifacts.Shard]) -> dict[str, artifacts.Shard]:
    """Return the shards of ``previous``, by name, that deliberately omit images of the same tar in ``sources``."""
    tars = {shard.name: shard for shard in sources}
    return {
        shard.name: shard.reused_from(previous.uri)
        for shard in previous.manifest().shards
        if (tar := tars.get(shard.name)) is not None
        and shard.info.get("source") == tar.file(".tar").sha256
        # Older shards have no such field. They have fewer rows than the tar, unless the tar has been compacted.
        and (PART in shard.info or sum(shard.info["outcomes"].values()) < tar.rows)
    }


def _build_worker(images_uri: str, folder_uri: str, config: WorkerConfig, cache: Path) -> "EmbedShard":
    from tasks.embed.worker import EmbedShard

    return EmbedShard(images_uri, folder_uri, config, cache)


def _identity_of(encoder: str) -> EncoderIdentity:
    from model.encoder.clip import Encoder

    return Encoder(encoder).identity


def _sum_info(embedded: list[artifacts.Shard]) -> dict[str, Any]:
    """Sum the counts and times of the embedded shards. ``accelerator_busy``, in [0, 1], also describes a CPU."""
    summed: dict[str, Any] = {name: sum(shard.info[name] for shard in embedded) for name in ("copied", *SECONDS)}
    busy = summed["compute_s"] / summed["turn_s"] if summed["turn_s"] else 0.0
    return {**summed, "embedded": sum(shard.rows for shard in embedded) - summed["copied"], "accelerator_busy": busy}


def _note(manifest: artifacts.Manifest) -> str:
    """Format the encoder's name, the time of each step, and the numbers of skipped and reused rows and shards."""
    info, parts = manifest.info, [manifest.identity["encoder"]["name"]]
    if info.get("embedded"):
        parts += [f"{name.removesuffix('_s')} {info[name]:.1f} s" for name in SECONDS if name != "turn_s"]
        parts.append(f"encoder busy for {info['accelerator_busy']:.0%} of the time")
    if died := info["outcomes"].get(DECODER_DIED):
        parts.append(f"{died} images skipped because they killed their decoder")
    if info.get("copied"):
        parts.append(f"{info['copied']} rows copied")
    if info.get("shards_taken_over"):
        parts.append(f"{info['shards_taken_over']} of {len(manifest.shards)} shards reused")
    return ", ".join(parts)
