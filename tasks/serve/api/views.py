"""Bodies of the REST routes beyond the service's requests and responses."""

from pydantic import BaseModel, ConfigDict, Field

from tasks.serve.api.problems import is_expected
from tasks.serve.service.errors import public_message
from tasks.serve.service.jobs import Job, State


class JobView(BaseModel):
    """State of a job."""

    model_config = ConfigDict(frozen=True)

    id: str
    state: State
    position: int | None = Field(None, description="Number of jobs before it, if it is queued.")
    step: int = Field(0, description="Finished steps.")
    steps: int = Field(0, description="Total steps; 0 if unknown.")
    error: str | None = None

    @classmethod
    def of(cls, job: Job) -> "JobView":
        """Return the state of ``job`` now."""
        status = job.status()
        error = None
        fault = job.future.exception() if status.state == "failed" else None
        if fault is not None:
            error = public_message(fault) if is_expected(fault) else "the service failed; its log names the reason"
        return cls(
            id=job.id, state=status.state, position=status.position, step=status.step, steps=status.steps, error=error
        )


class SwapRequest(BaseModel):
    """Version to serve."""

    model_config = ConfigDict(extra="forbid")

    version: int | None = Field(None, ge=1, description="Registered version. Default: the champion.")


class Readiness(BaseModel):
    """Readiness of the service."""

    ready: bool
    problems: list[str] = Field(
        [],
        description="What is not as configured, e.g. a version that does not open. Needs a key if keys are set.",
    )
