"""Flow that decides about candidates that nobody has decided about.

The event of a registration starts it for one registered model. Prefect may lose or repeat events, so a schedule starts
it for all models. A decision is made once: it is recorded under the lease of the model, and is then not repeated.
"""

import dataclasses
from typing import ClassVar

from prefect import flow

from flows.deployed_run import deployable
from flows.form import Form
from infra import compute, logs
from infra.errors import LeaseHeldError
from infra.promotions import Decision, Promotions
from infra.settings import Settings
from infra.storage.lease import lease
from tasks.promote import PromotionRequest, promote, promotion_folder, registered_name
from tasks.promotion.config import GeneratorGates
from tasks.stage import settings_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(Form):
    """Models whose candidates are decided about, and the gates.

    Attributes:
        name: Domain, or registered model: ``knn-database.<domain>`` or ``knn-diffusion``. Default: all models.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        generator: Gates of a generator.
        approval: Require the tag ``approval=approved`` of a version. Default: False.
    """

    COMMON: ClassVar = ("name", "approval", "root")

    name: str | None = None
    root: str | None = None
    generator: GeneratorGates = dataclasses.field(default_factory=GeneratorGates)
    approval: bool = False


@flow(name="sweep", validate_parameters=True)
@deployable
def sweep(config: SweepConfig) -> list[Decision]:
    """Promote or refuse each undecided candidate. A model that another writer holds is left to the next sweep."""
    settings = settings_of(config.root)
    names = Promotions(settings).names() if config.name is None else [registered_name(config.name)]
    decisions = []
    with compute.cluster(settings.ray_address, settings.cpus):
        for name in names:
            try:
                decision = _decide(name, config, settings)
            except LeaseHeldError as error:
                logs.get("stage").warning("%-11s %s is left to the next sweep: %s", "sweep", name, error)
                continue
            if decision is not None:
                decisions.append(decision)
    logs.get("stage").info("%-11s %d models, %d decisions", "sweep", len(names), len(decisions))
    return decisions


def _decide(name: str, config: SweepConfig, settings: Settings) -> Decision | None:
    with lease(promotion_folder(name, settings), holder=f"sweep {name}"):
        version = Promotions(settings).undecided(name)
        if version is None:
            return None
        request = PromotionRequest(name=name, version=version, generator=config.generator, approval=config.approval)
        return promote(request, settings)
