"""Flow that promotes a registered version: measure the gates, decide, move ``champion``, and record the decision."""

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Ge
from prefect import flow

from flows.deployed_run import deployable
from flows.form import Form
from infra import compute
from infra.errors import ConfigError
from infra.promotions import Decision
from infra.storage.lease import lease
from tasks.promote import PromotionRequest, candidate_of, promote, promotion_folder, registered_name
from tasks.promotion.config import DatabaseGates, GeneratorGates
from tasks.stage import settings_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromoteVersionConfig(Form):
    """Version to promote and its gates.

    Attributes:
        name: Domain, or registered model: ``knn-database.<domain>`` or ``knn-diffusion``.
        version: Number of the version. Default: the candidate.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        database: Gates of a database. Default: those of its domain when it was registered, or the defaults.
        generator: Gates of a generator.
        approval: Require the tag ``approval=approved`` of the version. Default: False.
        force: Promote even if gates fail. Default: False.
        reason: Reason to record; required with ``force``.
        wait_s: Seconds to wait for another writer of this model before failing. Default: 0.
    """

    COMMON: ClassVar = ("name", "version", "approval", "force", "reason", "root")

    name: str
    version: Annotated[int, Ge(1)] | None = None
    root: str | None = None
    database: DatabaseGates | None = None
    generator: GeneratorGates = dataclasses.field(default_factory=GeneratorGates)
    approval: bool = False
    force: bool = False
    reason: str = ""
    wait_s: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.wait_s < 0:
            raise ConfigError(f"wait_s is out of range: {self.wait_s}; give 0 or more seconds")


@flow(name="promote-version", flow_run_name="promote-{config.name}", validate_parameters=True)
@deployable
def promote_version(config: PromoteVersionConfig) -> Decision:
    """Make a registered version the champion if its gates pass, and record the decision."""
    settings = settings_of(config.root)
    name = registered_name(config.name)
    with (
        lease(promotion_folder(name, settings), holder=f"promote-version {name}", wait_s=config.wait_s),
        compute.cluster(settings.ray_address, settings.cpus),
    ):
        request = PromotionRequest(
            name=name,
            version=candidate_of(name, settings) if config.version is None else config.version,
            database=config.database,
            generator=config.generator,
            approval=config.approval,
            force=config.force,
            reason=config.reason,
        )
        return promote(request, settings)
