"""The command ``distil``: train a copy of a saved generator to need a few network calls, and no guidance."""

import argparse
import copy
import json
import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.diffusion.few_steps import few_step_levels, solve_few_steps
from model.images import image_grid, to_pil
from model.networks.editor import generating
from model.networks.image_tokens import takes_images
from model.pipeline import KNNDiffusionPipeline
from model.training.objectives.distillation import SUBSTEPS, Distillation, Teacher
from sticker_recipe.data import WATCHED, conditioning, prepare, training_set
from sticker_recipe.monitoring import Log, Unseen
from sticker_recipe.results import export
from sticker_recipe.runs import open_continuous, run, save

KEPT = ("neighbours", "candidates", "query", "prediction")
"""Sampling defaults of the teacher that the student keeps."""
COMPARED = 64
"""Images of the unseen style for which student and teacher are compared."""


class FewSteps(Unseen):
    """Images of the unseen style, to compare the samples of the student with those of the teacher."""

    def __init__(self, data: dict[str, NDArray[Any]], device: str, teacher: KNNDiffusionPipeline, steps: int) -> None:
        """Sample from the guided ``teacher`` in as many steps as in training, from the noise of :meth:`sample`."""
        super().__init__(data[f"{WATCHED}_pixels"], data[f"{WATCHED}_rows"], device, count=COMPARED)
        self._levels, self._prediction = few_step_levels(steps), teacher.config.prediction
        with torch.inference_mode():
            tokens = self._condition(teacher.transformer)
            self._expected = teacher.backbone.generate(
                tokens, self._noise(len(tokens)), steps=steps * SUBSTEPS, negative=None, on_step=lambda _: None,
                guidance_scale=teacher.config.guidance_scale,
            )  # fmt: skip

    @torch.inference_mode()
    def loss(self, network: nn.Module) -> float:
        """Return the mean squared distance of the samples to those of the teacher, from the same noise."""
        return float((self.sample(network, self._condition(network)) - self._expected).square().mean())

    def sample(self, network: nn.Module, tokens: Tensor, steps: int = 0) -> Tensor:
        """Sample images (B, 3, S, S) in [−1, 1] on the grid of the student. ``steps`` is unused."""
        denoiser, noise = generating(network, self._prediction), self._noise(len(tokens))
        return solve_few_steps(denoiser, noise, tokens, self._levels, lambda _: None).clamp(-1, 1)


def distil(options: argparse.Namespace) -> None:
    """Train the student of the pipeline ``--start-from`` to sample in ``--steps`` network calls."""
    pipeline = open_continuous(options)
    network, config, on_cuda = pipeline.transformer, pipeline.config, torch.device(options.device).type == "cuda"
    options.size = pipeline.side
    options.image_tokens = network.config.neighbour_images if takes_images(network) else 0
    data = prepare(options)
    dataset = training_set(data, options)
    student = copy.deepcopy(network).requires_grad_(True)
    pipeline.to(options.device, torch.bfloat16 if on_cuda else torch.float32)
    unseen = FewSteps(data, options.device, pipeline, options.steps)
    if on_cuda:
        pipeline.compile()
    first, last = config.guidance_interval
    teacher = Teacher(
        network=network, prediction=config.prediction, guide=pipeline.guide,
        guidance_scale=config.guidance_scale, guidance_interval=(first, last),
    )  # fmt: skip
    levels, folder = few_step_levels(options.steps), options.out / options.command
    objective = Distillation(conditioning(options), teacher, levels)
    pieces = math.gcd(options.batch, len(levels))  # the loss has a graph for each level
    trained = run(student, objective, dataset, options, Log(folder, unseen), pieces=pieces)
    average = trained.network
    defaults = {name: config[name] for name in KEPT}
    save(copy.deepcopy(average), options, noise_levels=list(levels), guidance_scale=1.0, **defaults)
    image_grid(to_pil(unseen.samples(average.to(options.device)))).save(folder / f"unseen-{WATCHED}.png")
    figures = {"images": trained.images, "seconds": trained.seconds, "distance": unseen.loss(average)}
    (folder / "figures.json").write_text(json.dumps(figures | {"device": options.device}, indent=1))
    if options.export:
        export(folder, options.export)
