"""Authentication of a driver at an existing Ray cluster."""

import contextlib
import os
from collections.abc import Iterator

from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]

from infra.compute.local_ray import accepts, reload_ray_config
from infra.errors import StageError

_MODE = "RAY_AUTH_MODE"
_FIX = (
    "set RAY_AUTH_TOKEN_PATH to the same token file for the head, the workers and this command, and RAY_AUTH_MODE to "
    "token or leave it unset"
)


@contextlib.contextmanager
def cluster_token(address: str) -> Iterator[None]:
    """Use the user's token inside the block if the cluster at ``address`` requires one.

    ``ray start`` turns authentication on as soon as it finds a token, in ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or
    ``~/.ray/auth_token``, but ``ray.init`` of a driver needs ``RAY_AUTH_MODE=token`` too. A mode that the user has set
    remains in effect.

    Raises:
        ConnectionError: No cluster was found.
        StageError: The cluster requires another token.
    """
    target = None if "://" in address else canonicalize_bootstrap_address(address, None)
    if target is None or _is_accepted(target):
        yield
        return
    has_token = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if not has_token:
        raise StageError(f"the Ray cluster at {target} requires a token, and there is none; {_FIX}")
    if _MODE in os.environ:
        mode = os.environ[_MODE]
        raise StageError(f"the Ray cluster at {target} requires another token ({_MODE} is {mode}); {_FIX}")
    os.environ[_MODE] = "token"
    reload_ray_config()
    try:
        if not _is_accepted(target):
            raise StageError(f"the Ray cluster at {target} requires another token than this machine's; {_FIX}")
        yield
    finally:
        os.environ.pop(_MODE, None)
        reload_ray_config()


def _is_accepted(target: str) -> bool:
    """Return False if the cluster refuses this process for its token. Other errors are left to ``ray.init``."""
    if not accepts(target):  # GcsClient retries a closed port for 40 s
        return True
    try:
        GcsClient(address=target)
    except Exception as error:  # its type differs between versions of Ray
        return "AuthToken" not in str(error) and "Unauthenticated" not in str(error)
    return True
