"""Evaluation of a fake generator with known scores: it copies the database, or returns noise."""

import dataclasses
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import tiny_models
from support.fakes import WithoutRay, share_encoder

from infra import artifacts
from infra.errors import EncoderMismatchError, InputError
from tasks.evaluate import measure as measuring
from tasks.evaluate.measure import EvaluationInputs, measure
from tasks.evaluate.sampler import ABLATIONS, queries_of
from tasks.evaluate.tables import METRICS
from tasks.evaluate.task import EvaluateConfig, Evaluation, evaluate
from tasks.references.domain_folder import DomainFolder
from tasks.references.images import fetch_images
from tasks.references.types import DatabaseVersion, Generator, domain_of, encoder_of

GENERATOR = Generator(uri="sticker-generator", rows=0, digest="0" * 64)
CONFIG = EvaluateConfig(samples=20, bootstrap=0, seeds=2, diversity_prompts=3)
WITH_INTERVALS = dataclasses.replace(CONFIG, bootstrap=50)  # takes seconds


class FakePipeline:
    """Fake pipeline: with retrieval it returns the stored image nearest to each query, without it noise."""

    calls: list[dict[str, Any]]
    version: DatabaseVersion
    cache: Path

    def __init__(self, database: Any) -> None:
        from model.encoder.clip import encoder_for

        self.database, self.encoder, self.identity = database, encoder_for(database.encoder), database.encoder
        self.config = types.SimpleNamespace(query="mean", neighbours=4)

    @classmethod
    def open(cls, folder: Path, database: Any) -> "FakePipeline":
        return cls(database)

    def __call__(self, queries: torch.Tensor, *, on_progress: Any, num_images_per_prompt: int, **options: Any) -> Any:
        self.calls.append({"images": len(queries) * num_images_per_prompt, **options})
        if options["retrieve"]:
            ids = self.database.search(queries.numpy(), 1).ids[:, 0]
            images = fetch_images(self.version, ids.repeat(num_images_per_prompt).tolist(), self.cache)
        else:
            rng = np.random.default_rng(0)
            images = [Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(len(queries))]
        return types.SimpleNamespace(images=[image.resize((48, 48)) for image in images])


@pytest.fixture
def version(domain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatabaseVersion:
    database: DatabaseVersion = domain.result.database.reference
    for name, value in {"calls": [], "version": database, "cache": tmp_path}.items():
        monkeypatch.setattr(FakePipeline, name, value, raising=False)
    monkeypatch.setattr("tasks.evaluate.measure.KNNDiffusionPipeline", FakePipeline)
    share_encoder(monkeypatch)
    return database


def run_measure(version: DatabaseVersion, folder: Path, config: EvaluateConfig = CONFIG, **others: Any) -> Any:
    subject = EvaluationInputs(generator=GENERATOR, name="shapes", database=version, others=others, config=config)
    return measure(subject, str(folder / "evaluation"), folder).info


def test_measure_scores_copying_generator_as_copies(version: DatabaseVersion, tmp_path: Path) -> None:
    scores = run_measure(version, tmp_path)["scores"]
    assert scores["clip_score_knn"] == pytest.approx(1, abs=0.02)  # the queries are database images
    assert scores["copy_rate_knn"] == 1.0
    assert scores["authenticity_knn"] == 0.0 < scores["authenticity_real"]
    assert scores["coverage_knn"] > scores["coverage_no_knn"]
    assert scores["nearest_knn"] == pytest.approx(1, abs=0.02) != scores["nearest_real"]
    assert scores["precision_knn"] > 0.9
    assert scores["diversity_knn"] == pytest.approx(0, abs=1e-3)
    assert scores["copy_rate_no_knn"] == scores["recall_no_knn"] == 0.0
    assert scores["fd_knn"] < scores["fd_no_knn"]
    assert scores["mmd_knn"] < scores["mmd_no_knn"]


def test_measure_returns_interval_for_every_score(version: DatabaseVersion, tmp_path: Path) -> None:
    scores = run_measure(version, tmp_path, WITH_INTERVALS)["scores"]
    two_sided = set(METRICS) - {"fid", "diversity"}
    names = {f"{metric}_{condition}" for metric in two_sided for condition in ("knn", "no_knn")} | {"diversity_knn"}
    real = {
        "fd_real_split",
        "mmd_real_split",
        "nearest_real",
        "copy_rate_real",
        "authenticity_real",
        "coverage_real_split",
    }
    assert set(scores) == names | {f"{name}_{end}" for name in names for end in ("low", "high")} | real
    for name in names:
        assert scores[f"{name}_low"] - 1e-9 <= scores[name] <= scores[f"{name}_high"] + 1e-9, name
    without = run_measure(version, tmp_path / "b")["scores"]
    assert set(without) == names | real
    assert {name: scores[name] for name in without} == pytest.approx(without)


def test_measure_compares_at_most_half_of_the_database(version: DatabaseVersion, tmp_path: Path) -> None:
    """Real images and samples are compared at equal size, because FD and MMD fall with the number of images."""
    half = version.rows // 2
    many = run_measure(version, tmp_path, dataclasses.replace(CONFIG, samples=version.rows - 1))
    few = run_measure(version, tmp_path / "b", dataclasses.replace(CONFIG, samples=half))
    assert many["compared"] == few["compared"] == half
    for name in ("fd_real_split", "mmd_real_split", "copy_rate_real", "nearest_real"):
        assert many["scores"][name] == few["scores"][name]


def test_measure_generates_equal_conditions_once(version: DatabaseVersion, tmp_path: Path) -> None:
    ablations = run_measure(version, tmp_path, dataclasses.replace(CONFIG, ablations=True))["ablations"]
    assert set(ablations) == set(ABLATIONS) == {
        "no_neighbours", "query_none", "query_text", "query_mean", "query_both", "k_1", "k_4", "k_10", "k_20",
    }  # fmt: skip
    generated = [
        (call["retrieve"], call["query"], call["neighbours"]) for call in FakePipeline.calls if call["images"] == 20
    ]
    assert sorted(generated, key=str) == sorted(
        [(False, "text", None), *((True, query, 4) for query in ("mean", "none", "text", "both"))]
        + [(True, "mean", k) for k in (1, 10, 20)],
        key=str,
    )
    assert (
        len({tuple(call["generator"].initial_seed() for _ in "x") for call in FakePipeline.calls}) == 1
    )  # the same noise for all


def test_measure_uses_steps_and_guidance_of_pipeline_by_default(version: DatabaseVersion, tmp_path: Path) -> None:
    run_measure(version, tmp_path)
    run_measure(version, tmp_path / "b", dataclasses.replace(CONFIG, steps=3, guidance=1.5))
    options = {(call["num_inference_steps"], call["guidance_scale"]) for call in FakePipeline.calls}
    assert options == {(None, None), (3, 1.5)}


def test_measure_saves_worst_copies_with_sources(version: DatabaseVersion, tmp_path: Path) -> None:
    copies = run_measure(version, tmp_path)["copies"]
    cosines = [copied["cosine"] for copied in copies]
    assert len(copies) == 10
    assert cosines == sorted(cosines, reverse=True)
    assert all(copied["copy"] for copied in copies)
    for rank, copied in enumerate(copies):
        (stored,) = fetch_images(version, [copied["row"]], tmp_path)
        with Image.open(tmp_path / "evaluation" / "copies" / f"{rank:02d}_source.png") as source:
            assert np.array_equal(np.asarray(source), np.asarray(stored))
        with Image.open(tmp_path / "evaluation" / "copies" / f"{rank:02d}_sample.png") as sample:
            assert np.array_equal(np.asarray(sample), np.asarray(stored.resize((48, 48))))
        assert copied["url"].startswith("http://127.0.0.1")


def test_measure_returns_swap_row_for_other_domains(version: DatabaseVersion, tmp_path: Path) -> None:
    assert run_measure(version, tmp_path)["swap"] == {}
    swap = run_measure(version, tmp_path / "b", twin=version)["swap"]
    assert set(swap) == {"shapes", "twin"}
    assert swap["shapes"] == swap["twin"] > 0


def test_evaluate_raises_for_domain_of_another_encoder_before_generating(domain: Any, tmp_path: Path) -> None:
    database = domain.result.database.reference
    stage = artifacts.ArtifactBuilder(str(tmp_path / "foreign"), DatabaseVersion.kind, inputs={}, config={})
    width = encoder_of(
        database.manifest()
    ).dimension  # same width: a distance could be computed, but would be meaningless
    manifest = stage.commit([], identity={"encoder": dataclasses.asdict(tiny_models.identity(width))}, info={})
    others = {"foreign": DatabaseVersion.of(manifest, stage.uri)}
    with pytest.raises(EncoderMismatchError, match=r"shapes was made by sticker-clip .*, foreign by tiny-clip"):
        evaluate(GENERATOR, database, DomainFolder(uri=str(tmp_path / "base"), cache=tmp_path), CONFIG, others=others)
    assert not (tmp_path / "base").exists()


def test_measure_scores_real_images_with_their_prompts(version: DatabaseVersion, domain: Any, tmp_path: Path) -> None:
    texts = domain.config.evaluate.prompts
    urls = tuple(domain.server.url(f"/{text.replace(' ', '-')}.png") for text in texts)
    own, other = (
        run_measure(version, tmp_path / name, dataclasses.replace(config, prompts=texts, prompt_urls=listed))["scores"]
        for name, config, listed in (("own", WITH_INTERVALS, urls), ("other", CONFIG, urls[::-1]))
    )
    assert own["clip_score_real"] > other["clip_score_real"] + 0.05
    assert own["clip_score_real_low"] < own["clip_score_real"] < own["clip_score_real_high"]


def test_queries_of_uses_every_prompt_before_repeating(domain: Any, version: DatabaseVersion, tmp_path: Path) -> None:
    from tasks.references.database import open_database

    database = open_database(version, tmp_path)
    pipeline: Any = FakePipeline(database)
    prompts = [f"text {number}" for number in range(7)]
    queries, texts = queries_of(pipeline, database, prompts, 16, seed=0)
    assert sorted(texts[:7]) == sorted(texts[7:14]) == prompts != texts[:7]
    assert len({(text, row.numpy().tobytes()) for text, row in zip(texts, queries, strict=True)}) == 7
    assert torch.equal(queries, pipeline.encoder.embed_texts(texts))
    assert queries_of(pipeline, database, prompts, 16, seed=0)[1] == texts
    assert queries_of(pipeline, database, prompts, 16, seed=1)[1] != texts


def test_evaluate_skips_existing_evaluation(domain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, database = domain.result.trained.generator.reference, domain.result.database.reference
    config = EvaluateConfig(samples=8, steps=1, bootstrap=3, seeds=2, diversity_prompts=1)
    folder = DomainFolder(uri=str(tmp_path), cache=tmp_path)
    WithoutRay().install(monkeypatch)  # the domain was evaluated on Ray
    first, again = (evaluate(generator, database, folder, config, others={"twin": database}) for _ in range(2))
    assert (first.skipped, again.skipped) == (False, True)
    assert first.reference == again.reference == Evaluation.open(first.reference.uri)
    assert set(first.reference.swap()) == {"shapes", "twin"}
    assert first.reference.ablations() == {}
    assert artifacts.read_manifest(first.reference.uri).info["copy_threshold"] > 0
    lines = (Path(first.reference.uri) / "scores.csv").read_text().splitlines()
    assert f"clip_score_knn,{first.reference.scores()['clip_score_knn']:.6f}" in lines
    assert domain_of(database) == "shapes"


def test_measure_computes_fid_on_centre_crops(
    version: DatabaseVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored images are 48 × 48; they are fetched padded to 96 × 48 with the same centre."""

    def widened(version: DatabaseVersion, ids: list[int], cache: Path) -> list[Image.Image]:
        return [ImageOps.pad(image, (96, 48), color="red") for image in fetch_images(version, ids, cache)]

    compared: list[list[Any]] = []

    def calculate(**arguments: Any) -> dict[str, float]:
        compared.append([list(arguments["input1"]), list(arguments["input2"])])
        return {"frechet_inception_distance": float(len(compared))}

    torch_fidelity: Any = types.ModuleType("torch_fidelity")
    torch_fidelity.__spec__ = importlib.machinery.ModuleSpec("torch_fidelity", None)
    torch_fidelity.calculate_metrics = calculate
    monkeypatch.setitem(sys.modules, "torch_fidelity", torch_fidelity)
    monkeypatch.setattr("tasks.evaluate.measure.fetch_images", widened)
    torch.save({}, tmp_path / "inception.pth")
    config = dataclasses.replace(CONFIG, inception_weights=str(tmp_path / "inception.pth"))
    scores = run_measure(version, tmp_path, config)["scores"]
    assert (scores["fid_knn"], scores["fid_no_knn"]) == (1.0, 2.0)
    stored = {np.asarray(image).tobytes() for image in fetch_images(version, list(range(version.rows)), tmp_path)}
    for samples, real in compared:
        assert len(samples) == len(real) == CONFIG.samples
        assert {(image.dtype, image.shape) for image in samples + real} == {(torch.uint8, (3, 48, 48))}
        assert {image.permute(1, 2, 0).numpy().tobytes() for image in real} <= stored


def test_evaluate_raises_for_missing_inception_weights_before_generating(domain: Any, tmp_path: Path) -> None:
    database = domain.result.database.reference
    config = dataclasses.replace(CONFIG, inception_weights=str(tmp_path / "inception.pth"))
    with pytest.raises(InputError, match=r"Inception weights not found: .*inception\.pth; give the path"):
        evaluate(GENERATOR, database, DomainFolder(uri=str(tmp_path), cache=tmp_path), config)
    assert not list(tmp_path.iterdir())


def test_measure_raises_for_too_small_database_before_generating(
    version: DatabaseVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = measuring.open_database

    def open_few(requested: DatabaseVersion, cache: Path) -> Any:
        return range(3) if requested == few else original(requested, cache)

    few = dataclasses.replace(version, digest="1" * 64)
    monkeypatch.setattr(measuring, "open_database", open_few)
    with pytest.raises(InputError, match="database stamps is too small to evaluate: 3 images; use one with at least 4"):
        run_measure(version, tmp_path, stamps=few)
    assert not FakePipeline.calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 3}, "too few samples: 3; give at least 4"),
        ({"seeds": 1}, "seeds 1, .*; give at least 2 seeds"),
        ({"bootstrap": -1}, "bootstrap is negative: -1"),
        ({"copy_percentile": 100}, "copy_percentile is out of range: 100"),
        ({"near_duplicate": 1.5}, "near_duplicate is out of range: 1.5"),
        ({"prompts": ("a", "b"), "prompt_urls": ("x",)}, "numbers of prompt_urls and prompts differ: 1, 2"),
    ],
)
def test_evaluate_config_raises_for_invalid_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**changes)


def test_fetch_images_preserves_order_of_ids(domain: Any, tmp_path: Path) -> None:
    from model.encoder.clip import encoder_for
    from tasks.references.database import open_database
    from tasks.references.types import encoder_of

    version = domain.result.database.reference
    ids = [17, 3, 17, 40, 0]
    images = fetch_images(version, ids, tmp_path)
    rows = encoder_for(encoder_of(version.manifest())).embed_images(images).numpy()
    assert np.einsum("nd,nd->n", rows, open_database(version, tmp_path).rows(np.array(ids))) == pytest.approx(
        1, abs=0.02
    )


def test_evaluation_manifest_contains_fields_of_report(domain: Any) -> None:
    info = artifacts.read_manifest(domain.result.trained.evaluation.reference.uri).info
    assert {"scores", "ablations", "swap", "copies", "copy_threshold", "shown", "encoder"} <= set(info)
