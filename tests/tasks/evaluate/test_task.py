"""Evaluation by stand-ins whose scores are known: one that copies the database, one that draws noise."""

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

from infra import artifacts, compute
from infra.errors import EncoderMismatchError, InputError
from tasks.evaluate import measure as measuring
from tasks.evaluate.measure import EvaluationInputs, measure
from tasks.evaluate.sampler import ABLATIONS, queries_of
from tasks.evaluate.tables import METRICS
from tasks.evaluate.task import EvaluateConfig, Evaluation, evaluate
from tasks.references.images import fetch_images
from tasks.references.types import DatabaseVersion, Generator, domain_of, encoder_of

GENERATOR = Generator(uri="sticker-generator", rows=0, digest="0" * 64)
CONFIG = EvaluateConfig(samples=20, bootstrap=50, seeds=2, diversity_prompts=3)


class Standin:
    """Takes the pipeline's place: with retrieval it gives the stored picture nearest to each query, without, noise."""

    calls: list[dict[str, Any]]
    version: DatabaseVersion
    cache: Path

    def __init__(self, database: Any) -> None:
        from model.encoder.clip import encoder_for

        self.database, self.encoder = database, encoder_for(database.encoder)
        self.config = types.SimpleNamespace(query="mean", neighbours=4)

    @classmethod
    def open(cls, folder: Path, database: Any) -> "Standin":
        return cls(database)

    def __call__(self, queries: torch.Tensor, *, callback: Any, num_images_per_prompt: int, **options: Any) -> Any:
        self.calls.append({"pictures": len(queries) * num_images_per_prompt, **options})
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
        monkeypatch.setattr(Standin, name, value, raising=False)
    monkeypatch.setattr("tasks.evaluate.measure.KNNDiffusionPipeline", Standin)
    return database


def measured(version: DatabaseVersion, folder: Path, config: EvaluateConfig = CONFIG, **others: Any) -> Any:
    subject = EvaluationInputs(generator=GENERATOR, name="shapes", database=version, others=others, config=config)
    return measure(subject, str(folder / "evaluation"), folder).info


def test_a_generator_that_copies_is_told_by_every_score(version: DatabaseVersion, tmp_path: Path) -> None:
    scores = measured(version, tmp_path)["scores"]
    assert scores["clip_score_knn"] == pytest.approx(1, abs=0.02)  # database pictures were the queries
    assert scores["copy_rate_knn"] == 1.0
    assert scores["nearest_knn"] == pytest.approx(1, abs=0.02) != scores["nearest_real"]
    assert scores["precision_knn"] > 0.9
    assert scores["diversity_knn"] == pytest.approx(0, abs=1e-3)
    assert scores["copy_rate_no_knn"] == scores["recall_no_knn"] == 0.0
    assert scores["fd_knn"] < scores["fd_no_knn"]
    assert scores["mmd_knn"] < scores["mmd_no_knn"]


def test_every_score_has_its_interval_and_its_place_in_the_table(version: DatabaseVersion, tmp_path: Path) -> None:
    scores = measured(version, tmp_path)["scores"]
    two_sided = set(METRICS) - {"fid", "diversity"}
    judged = {f"{metric}_{condition}" for metric in two_sided for condition in ("knn", "no_knn")} | {"diversity_knn"}
    real = {"fd_real_split", "mmd_real_split", "nearest_real", "copy_rate_real"}
    assert set(scores) == judged | {f"{name}_{end}" for name in judged for end in ("low", "high")} | real
    for name in judged:
        assert scores[f"{name}_low"] - 1e-9 <= scores[name] <= scores[f"{name}_high"] + 1e-9, name
    without = measured(version, tmp_path / "b", dataclasses.replace(CONFIG, bootstrap=0))["scores"]
    assert set(without) == judged | real
    assert {name: scores[name] for name in without} == pytest.approx(without)


def test_real_images_are_held_against_as_many_as_samples_are(version: DatabaseVersion, tmp_path: Path) -> None:
    """Of more samples than half of the database, that many are compared; FD and MMD fall with the number."""
    half = version.rows // 2
    many = measured(version, tmp_path, dataclasses.replace(CONFIG, samples=version.rows - 1, bootstrap=0))
    few = measured(version, tmp_path / "b", dataclasses.replace(CONFIG, samples=half, bootstrap=0))
    assert many["compared"] == few["compared"] == half
    for name in ("fd_real_split", "mmd_real_split", "copy_rate_real", "nearest_real"):
        assert many["scores"][name] == few["scores"][name]


def test_a_condition_is_drawn_once_whatever_it_is_called(version: DatabaseVersion, tmp_path: Path) -> None:
    ablations = measured(version, tmp_path, dataclasses.replace(CONFIG, ablations=True))["ablations"]
    assert set(ablations) == set(ABLATIONS) == {
        "no_neighbours", "query_none", "query_text", "query_mean", "query_both", "k_1", "k_4", "k_10", "k_20",
    }  # fmt: skip
    drawn = [(call["retrieve"], call["query"], call["neighbours"]) for call in Standin.calls if call["pictures"] == 20]
    assert sorted(drawn, key=str) == sorted(
        [(False, "text", None), *((True, query, 4) for query in ("mean", "none", "text", "both"))]
        + [(True, "mean", k) for k in (1, 10, 20)],
        key=str,
    )
    assert (
        len({tuple(call["generator"].initial_seed() for _ in "x") for call in Standin.calls}) == 1
    )  # one noise for all


def test_steps_and_guidance_are_the_pipelines_own_unless_told(version: DatabaseVersion, tmp_path: Path) -> None:
    measured(version, tmp_path)
    measured(version, tmp_path / "b", dataclasses.replace(CONFIG, steps=3, guidance=1.5))
    asked = {(call["num_inference_steps"], call["guidance_scale"]) for call in Standin.calls}
    assert asked == {(None, None), (3, 1.5)}


def test_worst_copies_stand_beside_their_source(version: DatabaseVersion, tmp_path: Path) -> None:
    copies = measured(version, tmp_path)["copies"]
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


def test_samples_are_held_against_other_domains(version: DatabaseVersion, tmp_path: Path) -> None:
    assert measured(version, tmp_path)["swap"] == {}
    swap = measured(version, tmp_path / "b", twin=version)["swap"]
    assert set(swap) == {"shapes", "twin"}
    assert swap["shapes"] == swap["twin"] > 0


def test_domains_of_another_encoder_are_told_before_anything_is_drawn(domain: Any, tmp_path: Path) -> None:
    database = domain.result.database.reference
    stage = artifacts.ArtifactBuilder(str(tmp_path / "foreign"), DatabaseVersion.kind, inputs={}, config={})
    width = encoder_of(database.manifest()).dimension  # as wide: a distance to it could be computed, and means nothing
    manifest = stage.commit([], identity={"encoder": dataclasses.asdict(tiny_models.identity(width))}, info={})
    others = {"foreign": DatabaseVersion.of(manifest, stage.uri)}
    with pytest.raises(EncoderMismatchError, match=r"shapes was made by sticker-clip .*, foreign by tiny-clip"):
        evaluate(GENERATOR, database, str(tmp_path / "base"), CONFIG, cache=tmp_path, others=others)
    assert not (tmp_path / "base").exists()


def test_real_images_are_scored_with_their_own_texts(version: DatabaseVersion, domain: Any, tmp_path: Path) -> None:
    texts = domain.config.evaluate.prompts
    urls = tuple(domain.server.url(f"/{text.replace(' ', '-')}.png") for text in texts)
    own, other = (
        measured(version, tmp_path / name, dataclasses.replace(CONFIG, prompts=texts, prompt_urls=listed))["scores"]
        for name, listed in (("own", urls), ("other", urls[::-1]))
    )
    assert own["clip_score_real"] > other["clip_score_real"] + 0.05
    assert own["clip_score_real_low"] < own["clip_score_real"] < own["clip_score_real_high"]


def test_prompts_are_all_used_before_any_comes_again(domain: Any, version: DatabaseVersion, tmp_path: Path) -> None:
    from tasks.references.database import open_database

    database = open_database(version, tmp_path)
    pipeline: Any = Standin(database)
    prompts = [f"text {number}" for number in range(7)]
    queries, texts = queries_of(pipeline, database, prompts, 16, seed=0)
    assert sorted(texts[:7]) == sorted(texts[7:14]) == prompts != texts[:7]
    assert len({(text, row.numpy().tobytes()) for text, row in zip(texts, queries, strict=True)}) == 7
    assert torch.equal(queries, pipeline.encoder.embed_texts(texts))
    assert queries_of(pipeline, database, prompts, 16, seed=0)[1] == texts
    assert queries_of(pipeline, database, prompts, 16, seed=1)[1] != texts


def test_the_stage_is_skipped_for_what_it_has_measured(domain: Any, tmp_path: Path) -> None:
    generator, database = domain.result.trained.generator.reference, domain.result.database.reference
    config = EvaluateConfig(samples=8, steps=1, bootstrap=3, seeds=2, diversity_prompts=1)
    with compute.cluster():
        first, again = (
            evaluate(generator, database, str(tmp_path), config, cache=tmp_path, others={"twin": database})
            for _ in range(2)
        )
    assert (first.skipped, again.skipped) == (False, True)
    assert first.reference == again.reference == Evaluation.open(first.reference.uri)
    assert set(first.reference.swap()) == {"shapes", "twin"}
    assert first.reference.ablations() == {}
    assert artifacts.read_manifest(first.reference.uri).info["copy_threshold"] > 0
    lines = (Path(first.reference.uri) / "scores.csv").read_text().splitlines()
    assert f"clip_score_knn,{first.reference.scores()['clip_score_knn']:.6f}" in lines
    assert domain_of(database) == "shapes"


def test_fid_is_of_the_centre_squares_that_the_generator_learned_from(
    version: DatabaseVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored pictures are 48 × 48; here wide ones come, with the same in their middle."""

    def widened(version: DatabaseVersion, ids: list[int], cache: Path) -> list[Image.Image]:
        return [ImageOps.pad(picture, (96, 48), color="red") for picture in fetch_images(version, ids, cache)]

    compared: list[list[Any]] = []

    def calculate(**asked: Any) -> dict[str, float]:
        compared.append([list(asked["input1"]), list(asked["input2"])])
        return {"frechet_inception_distance": float(len(compared))}

    torch_fidelity: Any = types.ModuleType("torch_fidelity")
    torch_fidelity.__spec__ = importlib.machinery.ModuleSpec("torch_fidelity", None)
    torch_fidelity.calculate_metrics = calculate
    monkeypatch.setitem(sys.modules, "torch_fidelity", torch_fidelity)
    monkeypatch.setattr("tasks.evaluate.measure.fetch_pictures", widened)
    torch.save({}, tmp_path / "inception.pth")
    config = dataclasses.replace(CONFIG, inception_weights=str(tmp_path / "inception.pth"))
    scores = measured(version, tmp_path, config)["scores"]
    assert (scores["fid_knn"], scores["fid_no_knn"]) == (1.0, 2.0)
    stored = {np.asarray(picture).tobytes() for picture in fetch_images(version, list(range(version.rows)), tmp_path)}
    for samples, real in compared:
        assert len(samples) == len(real) == CONFIG.samples
        assert {(picture.dtype, picture.shape) for picture in samples + real} == {(torch.uint8, (3, 48, 48))}
        assert {picture.permute(1, 2, 0).numpy().tobytes() for picture in real} <= stored


def test_weights_that_are_not_there_are_told_before_anything_is_drawn(domain: Any, tmp_path: Path) -> None:
    database = domain.result.database.reference
    config = dataclasses.replace(CONFIG, inception_weights=str(tmp_path / "inception.pth"))
    with pytest.raises(InputError, match=r"no Inception weights at .*inception\.pth; give the path"):
        evaluate(GENERATOR, database, str(tmp_path), config, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_database_that_is_too_small_is_told_before_anything_is_drawn(
    version: DatabaseVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = measuring.open_database

    def open_few(asked: DatabaseVersion, cache: Path) -> Any:
        return range(3) if asked == few else opened(asked, cache)

    few = dataclasses.replace(version, digest="1" * 64)
    monkeypatch.setattr(measuring, "open_database", open_few)
    with pytest.raises(InputError, match="stamps holds 3 pictures; an evaluation compares at least 4"):
        measured(version, tmp_path, stamps=few)
    assert not Standin.calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 3}, "samples must be at least 4"),
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"bootstrap": -1}, "bootstrap must be 0 or more"),
        ({"copy_percentile": 100}, "copy_percentile must lie between"),
        ({"near_duplicate": 1.5}, "near_duplicate must lie above 0"),
        ({"prompts": ("a", "b"), "prompt_urls": ("x",)}, "prompt_urls must name a picture for each"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**changes)


def test_images_of_rows_come_in_the_order_asked(domain: Any, tmp_path: Path) -> None:
    from model.encoder.clip import encoder_for
    from tasks.references.database import open_database
    from tasks.references.types import encoder_of

    version = domain.result.database.reference
    ids = [17, 3, 17, 40, 0]
    pictures = fetch_images(version, ids, tmp_path)
    rows = encoder_for(encoder_of(version.manifest())).embed_images(pictures).numpy()
    assert np.einsum("nd,nd->n", rows, open_database(version, tmp_path).rows(np.array(ids))) == pytest.approx(
        1, abs=0.02
    )


def test_a_manifest_keeps_what_the_report_needs(domain: Any) -> None:
    info = artifacts.read_manifest(domain.result.trained.evaluation.reference.uri).info
    assert {"scores", "ablations", "swap", "copies", "copy_threshold", "shown", "encoder"} <= set(info)
