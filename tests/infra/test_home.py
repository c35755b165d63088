import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import InputError
from infra.home import FOLDERS, require_state_folder, set_home
from infra.settings import Settings

NOBODY = 54321  # a user id without an account
WRITE_STATE = """
import getpass, os, tempfile
from infra.home import set_home
set_home()
import matplotlib, torch.hub
from prefect.settings import get_current_settings
from huggingface_hub import constants
from infra.settings import Settings
folders = [matplotlib.get_configdir(), matplotlib.get_cachedir(), torch.hub.get_dir(), constants.HF_HOME,
           get_current_settings().home, Settings().cache_folder, tempfile.gettempdir()]
for folder in folders:
    os.makedirs(folder, exist_ok=True)
    print(os.path.realpath(folder))
print(getpass.getuser())
"""


def test_set_home_without_the_variable_changes_nothing() -> None:
    environment = {"HOME": "/nonexistent"}
    set_home(environment)
    assert environment == {"HOME": "/nonexistent"}


def test_set_home_keeps_variables_of_the_user(tmp_path: Path) -> None:
    environment = {"KNN_DIFFUSION_HOME": str(tmp_path), "PREFECT_HOME": "/srv/prefect", "LOGNAME": "me"}
    set_home(environment)
    assert environment["PREFECT_HOME"] == "/srv/prefect"
    assert environment["LOGNAME"] == "me"
    assert environment["HF_HOME"] == f"{tmp_path}/huggingface"
    assert environment.keys() >= FOLDERS.keys()


def test_settings_cache_is_below_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KNN_DIFFUSION_CACHE", raising=False)
    assert Settings().cache_folder == Path("~/.cache/knn-diffusion").expanduser()
    monkeypatch.setenv("KNN_DIFFUSION_HOME", str(tmp_path))
    assert Settings().cache_folder == tmp_path / "cache"


def test_require_state_folder_names_the_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    with pytest.raises(InputError, match=r"file/\.prefect cannot be written; set KNN_DIFFUSION_HOME to a folder"):
        require_state_folder("PREFECT_HOME", f"{tmp_path}/file/.prefect")
    monkeypatch.setenv("PREFECT_HOME", f"{tmp_path}/a/b")
    require_state_folder("PREFECT_HOME", f"{tmp_path}/file/.prefect")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def strangers_home() -> Iterator[Path]:
    """A folder of the other user. Not below ``tmp_path``: every start of pytest closes its folders to other users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can change to another user")
def test_libraries_keep_their_state_in_the_home_for_a_user_without_account_and_home(strangers_home: Path) -> None:
    home = strangers_home
    # The capability only lets the user read this checkout, wherever it is.
    read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    change_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *read]
    done = subprocess.run(
        [*change_user, sys.executable, "-c", WRITE_STATE],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KNN_DIFFUSION_HOME": str(home)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *folders, temporary, user = done.stdout.split()
    assert [folder for folder in folders if not Path(folder).is_relative_to(home)] == []
    assert Path(temporary).is_dir()
    assert user == f"uid{NOBODY}"
    assert all(path.stat().st_uid == NOBODY for path in home.rglob("*"))
