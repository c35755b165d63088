"""Checks of input before anything starts: each agrees with the code that uses the input, and none imports it."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app, inputs
from infra.errors import InputError, NotFoundError

REPORT = """
import atexit, sys
from flows.cli.app import main
atexit.register(lambda: print(*sorted({name.split(".")[0] for name in sys.modules})))
main()
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("new-domain", "x", "--urls", "ok.txt", "--encoder", "ViT-Z-99/openai"), "--encoder is unknown: ViT-Z-99"),
        (("new-domain", "x", "--urls", "none.txt"), "none.txt does not exist"),
        (("new-domain", "x", "--urls", "wrong.csv"), "wrong.csv has no column 'url', only link"),
        (("new-domain", "My Domain", "--urls", "ok.txt"), "domain 'My Domain' must be"),
        (("new-domain", "x", "--urls", "ok.txt", "--recipe", "nope"), "--recipe is unknown: nope; use one of own_"),
        (("new-domain", "x", "--urls", "ok.txt", "--texts", "none.txt"), "none.txt does not exist"),
        (("new-domain", "x", "--urls", "loopback.txt"), "add --allow-host 127.0.0.1:8123"),
        (("rebuild-index", "x", "--urls", "wrong.csv"), "wrong.csv has no column 'url', only link"),
        (("rebuild-index", "x", "--takedown", "wrong.csv"), "wrong.csv has none of the columns url, sha256 and key"),
        (("rebuild-index", "x", "--root", "typo"), "--root does not exist: typo"),
        (("databases", "--root", "typo"), "--root does not exist: typo"),
        (("gc", "--root", "typo"), "--root does not exist: typo"),
        (("evaluate", "x", "--root", "typo"), "--root does not exist: typo"),
        (("search", "x", "a", "--root", "typo"), "--root does not exist: typo"),
        (("search", "x", "a", "--html", "none/a.html"), "folder does not exist: none"),
        (("generate", "a", "--database", "x", "--out", "none/a.png"), "folder does not exist: none"),
        (("generate", "a", "--database", "x", "--out-dir", "none/a"), "--out-dir cannot be created: none/a"),
        (("edit", "none.png", "a", "--database", "x", "--out", "a.png"), "image does not exist: none.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_command_with_invalid_input_fails_before_heavy_imports(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "ok.txt").write_text("https://example.com/a.png\n")
    (tmp_path / "wrong.csv").write_text("link\nhttps://example.com/a.png\n")
    (tmp_path / "loopback.txt").write_text("http://127.0.0.1:8123/a.png\nhttp://127.0.0.1:8123/b.png\n")
    command = [sys.executable, "-c", REPORT, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("KNN_DIFFUSION_ROOT", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("knn-diffusion: ")
    assert message in line
    assert set(done.stdout.split()).isdisjoint({"prefect", "ray", "torch", "mlflow"})


@pytest.mark.parametrize("name", ["twemoji", "a", "0-b", "mlflow", "", "A", "a_b", "a.b", "-a", "a" * 63, "a" * 64])
def test_check_domain_accepts_what_the_config_accepts(name: str) -> None:
    from flows.new_domain import NewDomainConfig

    def accepts(check: object) -> bool:
        try:
            check(name)  # type: ignore[operator]
        except (ValueError, InputError):
            return False
        return True

    assert accepts(inputs.check_domain) == accepts(lambda name: NewDomainConfig(domain=name, urls="a.txt"))


def test_recipe_options_are_those_of_the_recipes() -> None:
    from flows.recipes import RECIPES

    common = {"domain", "urls", "root", "texts", "allow_hosts"}
    taken = {name: inspect.signature(recipe).parameters.keys() - common for name, recipe in RECIPES.items()}
    assert {name: set(options) for name, options in inputs.RECIPE_OPTIONS.items()} == taken
    assert list(inputs.RECIPE_OPTIONS) == list(RECIPES)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("photos_h100", (), "--autoencoder is missing"),
        ("stickers_h100", ("train",), "--train does not apply to --recipe stickers_h100"),
        ("own_domain", ("autoencoder",), "--autoencoder does not apply to --recipe own_domain"),
    ],
)
def test_check_recipe_with_unsuitable_option_fails(recipe: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs.check_recipe(recipe, options)


def test_check_encoder_accepts_every_pretrained_model_of_open_clip() -> None:
    import open_clip

    for architecture, weights in open_clip.list_pretrained():
        inputs.check_encoder(f"{architecture}/{weights}")
    inputs.check_encoder("ViT-B-32/LAION2B-s34b-b79k")
    inputs.check_encoder("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    inputs.check_encoder("sticker-clip")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32", "has no weights: ViT-B-32; use ARCHITECTURE/WEIGHTS"),
        ("ViT-B-32/nope", "has unknown weights: ViT-B-32/nope"),
        ("hf-hub:clip", "is not a repository: hf-hub:clip"),
        ("local-dir:/no/such", "has no open_clip_config.json: local-dir:/no/such"),
        ("sticker-clop", "has no weights: sticker-clop"),
    ],
)
def test_check_encoder_of_impossible_name_fails(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs.check_encoder(name)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8123/a", "http://LOCALHOST:8123/a", "http://[::1]:8123/a", "http://10.0.0.1/a"]
)
def test_check_url_list_fails_only_if_every_address_is_blocked(url: str, tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text(f"{url}\n")
    with pytest.raises(InputError, match="add --allow-host ") as failed:
        inputs.check_url_list(str(path), ())
    inputs.check_url_list(str(path), (str(failed.value).split()[-1],))
    inputs.check_url_list(str(path))  # a rebuild allows the hosts of its champion
    path.write_text(f"{url}\nhttps://example.com/a.png\n")
    inputs.check_url_list(str(path), ())


def test_check_url_list_reads_only_short_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "urls.csv"
    path.write_text("link\nhttps://example.com/a.png\n")
    inputs.check_url_list("s3://bucket/none.csv", ())
    monkeypatch.setattr(inputs, "CHECKED_BYTES", 10)
    inputs.check_url_list(str(path), ())
    with pytest.raises(NotFoundError):
        inputs.check_url_list(str(tmp_path / "none.csv"), ())


@pytest.mark.parametrize(
    "arguments",
    [
        *[("promote", "x"), ("rollback", "x"), ("history", "x"), ("pull", "x", "--to", "y"), ("lineage", "x")],
        *[("merge", "x", "a", "/b"), ("subset", "x", "models:/a@b", "--where", "width > 1")],
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_that_reads_a_missing_root_fails(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments, "--root", f"{tmp_path}/typo"])
    assert result.exit_code == 1
    assert f"--root does not exist: {tmp_path}/typo; give the folder that new-domain wrote to" in result.output
    assert not (tmp_path / "typo").exists()


def test_check_root_requires_a_given_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KNN_DIFFUSION_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    inputs.check_root(None)
    inputs.check_root(str(tmp_path))
    inputs.check_root("s3://bucket/root")
    monkeypatch.setenv("KNN_DIFFUSION_ROOT", f"{tmp_path}/typo")
    with pytest.raises(InputError, match="KNN_DIFFUSION_ROOT does not exist"):
        inputs.check_root(None)
    inputs.check_root(str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    inputs.check_root(None)
