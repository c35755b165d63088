"""Events of the project in Prefect, which start the deployment ``sweep``."""

from prefect.context import FlowRunContext
from prefect.events import emit_event


def emit_registered(name: str, version: int) -> None:
    """Tell Prefect that a version of ``knn-database.<domain>`` or ``knn-diffusion`` was registered.

    Outside of a flow there is no server to tell. Prefect may lose the event; the scheduled sweep finds the version.
    """
    if FlowRunContext.get() is None:
        return
    emit_event(
        event=f"{name.partition('.')[0]}.registered",
        resource={"prefect.resource.id": name, "prefect.resource.name": name},
        payload={"version": version},
    )
