"""Flow that updates a domain's database: add new images, hide images taken down, register the result.

The key of each step contains the champion that it starts from and the step's inputs, and the champion alias moves
last. So a killed rebuild resumes, and one without changes creates no version.

Takedowns come first, in a version of their own. It becomes the champion before new URLs are downloaded, anything is
embedded again or shards are compacted, and it remains the champion if one of these fails.
"""

import dataclasses

from prefect import flow

from flows.deployed_run import deployable
from flows.rebuild_config import RebuildIndexConfig
from flows.rebuild_steps import State, champion_of, hide_takedown, reused_artifacts, update
from flows.run_page import show_database
from infra import compute, logs
from infra.storage.lease import lease
from model.errors import ModelError
from tasks.references.domain_folder import DomainFolder
from tasks.register import RegistrationResult, register_database
from tasks.stage import StageTimings, check_files, settings_of
from tasks.upkeep.policy import merge_with_existing
from tasks.upkeep.takedown import rolled_back_on, take_down


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """Database before and after the rebuild; seconds, and whether skipped, by stage that ran.

    The new version is only a candidate if the champion is pinned.
    """

    before: State
    after: State
    registered: RegistrationResult | None  # None: nothing changed
    seconds: dict[str, float]
    skipped: dict[str, bool]

    @property
    def unchanged(self) -> bool:
        """Return True if the rebuild registered no version."""
        return self.registered is None


@flow(name="rebuild-index", flow_run_name="rebuild-index-{config.domain}", validate_parameters=True)
@deployable
def rebuild_index(config: RebuildIndexConfig) -> Rebuilt:
    """Add new URLs to a domain's champion, hide and compact images taken down, and register the result.

    It becomes the champion if its gates pass and the champion is not pinned; see :mod:`tasks.promote`.
    """
    settings = settings_of(config.root)
    folder, timings = DomainFolder.of(settings, config.domain), StageTimings()
    with lease(folder.uri, holder=f"rebuild-index {config.domain}", wait_s=config.wait_s) as domain_lease:
        before = champion = champion_of(config.domain, settings)
        registered: RegistrationResult | None = None

        def register(state: State) -> None:
            nonlocal champion, registered
            domain_lease.check()
            if state is not champion:
                registered = register_database(
                    config.domain, state.database, settings, None, gates=config.gates, seconds=timings.seconds
                )
                champion = state

        # After a rollback of the champion, the domain has more takedowns than the champion hides.
        takedown = merge_with_existing(folder, before.takedown)
        with (
            compute.cluster(settings.ray_address, settings.cpus),
            rolled_back_on(folder, ModelError, but=lambda: champion.takedown),
        ):
            if config.takedown is not None:
                outcome = take_down(config.takedown, before.images, folder, previous=takedown)
                takedown = timings.add("takedown", outcome)
            if takedown != before.takedown:
                try:
                    register(hide_takedown(config, before, takedown, folder, timings))
                except ModelError as error:  # e.g. no row would remain: hide them in the version with the additions
                    logs.get("stage").warning("%-11s not hidden in a version of its own: %s", "takedown", error)
            # Only now: a takedown must not fail because of a damaged file.
            check_files(*reused_artifacts(config, champion), verify=config.verify)
            register(update(config, champion, takedown, folder, timings))
    show_database(config.domain, champion.database, registered, settings)
    if registered is None:
        logs.get("stage").info(
            "%-11s %s: no new images and no takedowns; the champion is unchanged", "rebuild", config.domain
        )
    return Rebuilt(
        before=before, after=champion, registered=registered, seconds=timings.seconds, skipped=timings.skipped
    )
