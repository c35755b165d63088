"""A flow without images, which holds the lease of a domain. It imports little, so that its runs start soon."""

import dataclasses
import os
import time
from pathlib import Path

from prefect import flow

from flows.deployed_run import deployable
from infra.settings import Settings
from infra.storage.lease import lease


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Domain whose lease is held, until its folder has a file ``go`` or for some seconds."""

    domain: str
    seconds: float


@flow(name="probe", validate_parameters=True)
@deployable
def probe(config: ProbeConfig) -> None:
    settings = Settings()
    folder = Path(settings.root, config.domain)
    folder.mkdir(parents=True, exist_ok=True)
    with lease(str(folder), holder=f"probe {config.domain}"):
        (folder / "process").write_text(str(os.getpid()))
        deadline = time.monotonic() + config.seconds
        while time.monotonic() < deadline and not (folder / "go").exists():
            time.sleep(0.2)
