"""The flow matching objective."""

from torch import Tensor, nn

from model.configs import ConditioningConfig, Prediction
from model.diffusion.conditioning import sample_condition
from model.diffusion.flow_matching import LOGIT_NORMAL, NoiseLevels, flow_matching_loss, sample_sigmas
from model.networks.editor import generating
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.shown_images import shown_images


class FlowMatching(nn.Module):
    """The loss of :mod:`model.diffusion.flow_matching`, with random parts of the condition hidden.

    An editor gets no reference from this objective, so it is trained to generate.
    """

    def __init__(
        self,
        conditioning: ConditioningConfig,
        prediction: Prediction = "velocity",
        *,
        levels: NoiseLevels = LOGIT_NORMAL,
    ) -> None:
        """Configure the objective.

        Args:
            conditioning: Probabilities of hiding and perturbing parts of the condition.
            prediction: Output of the network. Default: "velocity".
            levels: Distribution of the noise levels. Default: the standard logit-normal one.
        """
        super().__init__()
        self.conditioning, self.prediction, self.levels = conditioning, prediction, levels

    def forward(self, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        """Return the mean loss of ``batch``, a scalar float32."""
        condition = sample_condition(batch.query, batch.neighbours, self.conditioning, rng)
        sigma = sample_sigmas(len(batch.images), rng, self.levels)
        noise = rng.normal(*batch.images.shape)
        images = shown_images(network, batch, condition, self.conditioning, rng)
        denoiser = generating(network, self.prediction, images)
        return flow_matching_loss(denoiser, batch.images, condition.tokens, sigma, noise, self.prediction)
