"""Embed: image shards to CLIP embeddings in clip-retrieval's layout, one output shard for each input shard."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import artifacts, compute, storage
from infra.errors import StageError
from model.encoder.clip import Encoder
from model.encoder.identity import EMBEDDED, EncoderIdentity
from tasks.embed.worker import DECODER_DIED, SECONDS, EmbedShard, WorkerConfig
from tasks.references.types import EmbeddingShards, ImageShards, StageResult, encoder_of
from tasks.stage import run_shards, run_stage, stage_task, sum_outcomes
from tasks.upkeep.rewrite_embeddings import PART

_LOCAL = "local-dir:"
_MOST_DECODERS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Which encoder, and how it is fed."""

    encoder: str = EMBEDDED
    batch_size: int = 64
    workers: int | None = None  # None: one for each core of the cluster, or as many as its GPUs hold
    gpus_per_worker: float = 0  # 0: on the CPU, float32; else on CUDA, bfloat16; 0.5 lets two share a GPU
    decoders: int | None = None  # of each worker; None: one on the CPU, else its share of the cores
    max_lost_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Refuse an empty batch; name a local encoder by a path that means the same from every working directory."""
        if self.batch_size < 1 or (self.decoders is not None and self.decoders < 1):
            raise ValueError("batch_size and decoders must be at least 1")
        if self.gpus_per_worker < 0:
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}; give 0 for the CPU, or 0.5, 1, …")
        if self.encoder.startswith(_LOCAL):
            folder = storage.absolute(self.encoder.removeprefix(_LOCAL))
            object.__setattr__(self, "encoder", _LOCAL + folder)


@stage_task(name="embed")
def embed(
    images: ImageShards,
    base: str,
    config: EmbedConfig,
    *,
    cache: Path,
    previous: EmbeddingShards | None = None,
    verify: bool = False,
) -> StageResult[EmbeddingShards]:
    """Embed every picture of ``images`` into ``base/embeddings/<key>``.

    What ``previous`` holds already is not embedded again, if the same encoder made it with the same settings: a shard
    whose tar is the same is taken over, and of a tar that was rewritten the rows of the pictures that stayed are
    copied. The output is the same with and without it, and so is its key. But of a tar of which it holds a part, as
    the subset of a database does, only that part is embedded, by whatever encoder. With ``verify`` the digests of rows
    that are there already are checked; damaged shards are embedded again.

    Raises:
        ModelError: no such encoder.
        StageError: no picture could be decoded, or too many shards were lost.
    """
    stage = artifacts.ArtifactBuilder(
        base, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=_settings(config)
    )

    def make() -> artifacts.Manifest:
        sources = images.manifest().shards
        earlier = _reusable(previous, config, {shard.name for shard in sources}) if previous else {}
        parts = _parts(previous, sources) if previous else {}
        taken = {
            shard.name: earlier[shard.name]
            for shard in sources
            if shard.name in earlier and earlier[shard.name].info.get("source") == shard.file(".tar").sha256
        }
        items = [
            (shard.name, (shard, earlier.get(shard.name), parts.get(shard.name)))
            for shard in sources
            if shard.name not in taken
        ]
        settings = (images.uri, stage.uri, _feeding(config), cache)
        made, lost = run_shards(
            stage, items, EmbedShard, settings, max_lost_fraction=config.max_lost_fraction, **_resources(config)
        )
        done = [*taken.values(), *made]
        outcomes = sum_outcomes(done)
        if not outcomes.get("success"):
            raise StageError(f"no picture of {images.uri} could be decoded ({outcomes}); look at its tars")
        first, *others = (EncoderIdentity(**shard.info["encoder"]) for shard in done)
        if not all(first.same_space(other) for other in others):
            raise StageError(f"{config.encoder} changed while {stage.uri} was filled; delete that folder and run again")
        # A shard that was taken over may know the same encoder by another name.
        identity = {"encoder": {**dataclasses.asdict(first), "name": config.encoder}}
        info = {"outcomes": outcomes, "lost_shards": lost, "shards_taken_over": len(taken), **_measured(made)}
        return stage.commit(done, identity=identity, info=info)

    return run_stage(stage, EmbeddingShards, make, note=_note, verify=verify, repairs=True)


def _settings(config: EmbedConfig) -> dict[str, Any]:
    """What decides the rows. The batch size does: float16 rows may differ in the last bit between batch shapes."""
    precision = "bfloat16" if config.gpus_per_worker else "float32"
    return {"encoder": config.encoder, "batch_size": config.batch_size, "precision": precision}


def _feeding(config: EmbedConfig) -> WorkerConfig:
    cuda = config.gpus_per_worker > 0
    decoders = config.decoders or (_decoders_of_a_gpu_worker(config.gpus_per_worker) if cuda else 1)
    return WorkerConfig(encoder=config.encoder, batch_size=config.batch_size, cuda=cuda, decoders=decoders)


def _resources(config: EmbedConfig) -> dict[str, Any]:
    """Two shards for a worker: what comes before and after the computing of one goes beside that of the other."""
    cores = 1 + _feeding(config).decoders if config.gpus_per_worker else 1
    return {
        "actors": config.workers or compute.cpus(),
        "cpus_per_actor": cores,
        "gpus_per_actor": config.gpus_per_worker,
        "concurrency": 2,
    }


def _decoders_of_a_gpu_worker(gpus_each: float) -> int:
    """Its share of the cores, less its own."""
    workers = max(1, int(compute.gpus() / gpus_each))
    return max(1, min(_MOST_DECODERS, compute.cpus() // workers - 1))


def _reusable(previous: EmbeddingShards, config: EmbedConfig, names: set[str]) -> dict[str, artifacts.Shard]:
    """The shards of ``previous`` of these names, by name; none where its rows are not what ``config`` would give."""
    manifest = previous.manifest()
    decisive = {name: value for name, value in _settings(config).items() if name != "encoder"}
    there = {shard.name: shard.reused_from(previous.uri) for shard in manifest.shards if shard.name in names}
    if not there or any(manifest.config.get(name) != value for name, value in decisive.items()):
        return {}
    # Under one name there may be other weights today; only loading them tells.
    encoder: EncoderIdentity = compute.run(_identity_of, config.encoder)
    return there if encoder.same_space(encoder_of(manifest)) else {}


def _parts(previous: EmbeddingShards, sources: Sequence[artifacts.Shard]) -> dict[str, artifacts.Shard]:
    """The shards of ``previous``, by name, that leave pictures of the same tar in ``sources`` out on purpose."""
    tars = {shard.name: shard for shard in sources}
    return {
        shard.name: shard.reused_from(previous.uri)
        for shard in previous.manifest().shards
        if (tar := tars.get(shard.name)) is not None
        and shard.info.get("source") == tar.file(".tar").sha256
        # The count is for what was made before there was a mark; a compaction can raise it, and lose it thereby.
        and (PART in shard.info or sum(shard.info["outcomes"].values()) < tar.rows)
    }


def _identity_of(encoder: str) -> EncoderIdentity:
    return Encoder(encoder).identity


def _measured(made: list[artifacts.Shard]) -> dict[str, Any]:
    """What was counted and timed of the shards that were made, summed; ``accelerator_busy`` is a fraction."""
    summed: dict[str, Any] = {name: sum(shard.info[name] for shard in made) for name in ("copied", *SECONDS)}
    busy = summed["compute_s"] / summed["turn_s"] if summed["turn_s"] else 0.0
    return {**summed, "embedded": sum(shard.rows for shard in made) - summed["copied"], "accelerator_busy": busy}


def _note(manifest: artifacts.Manifest) -> str:
    """The encoder, where the time went, and what needed none."""
    info, parts = manifest.info, [manifest.identity["encoder"]["name"]]
    if info.get("embedded"):
        parts += [f"{name.removesuffix('_s')} {info[name]:.1f} s" for name in SECONDS if name != "turn_s"]
        parts.append(f"accelerator {info['accelerator_busy']:.0%} busy")
    if died := info["outcomes"].get(DECODER_DIED):
        parts.append(f"{died} images left out, which kill their decoder")
    if info.get("copied"):
        parts.append(f"{info['copied']} rows copied")
    if info.get("shards_taken_over"):
        parts.append(f"{info['shards_taken_over']} of {len(manifest.shards)} shards taken over")
    return ", ".join(parts)
