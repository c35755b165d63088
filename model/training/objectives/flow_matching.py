"""What a step minimises. The loop asks any of these for a loss and knows nothing else of them.

Each is a module, so what it learns of its own (the discrete objective's loss history) is kept with the checkpoint.
"""

from torch import Tensor, nn

from model.diffusion.conditioning import ConditioningConfig, training_condition
from model.diffusion.flow_matching import Prediction, flow_matching_loss, sample_sigmas
from model.networks.denoiser import as_denoiser, bare
from model.networks.editor import is_editor, with_reference
from model.step_random import StepRandom
from model.training.batch import Batch


class FlowMatching(nn.Module):
    """The loss of :mod:`model.diffusion.flow_matching` under a condition with parts hidden.

    A network that edits too is shown no picture to restore: it goes on learning to draw.
    """

    def __init__(self, conditioning: ConditioningConfig, prediction: Prediction = "velocity") -> None:
        """Hide what ``conditioning`` says; read the network's output as ``prediction``."""
        super().__init__()
        self.conditioning, self.prediction = conditioning, prediction

    def forward(self, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        """Mean loss of ``batch``, a scalar."""
        condition = training_condition(batch.query, batch.neighbours, self.conditioning, rng)
        sigma = sample_sigmas(len(batch.images), rng)
        noise = rng.normal(*batch.images.shape)
        denoiser = as_denoiser(network, self.prediction)
        if is_editor(bare(network)):
            denoiser = with_reference(denoiser, None)
        return flow_matching_loss(denoiser, batch.images, condition, sigma, noise)
