"""Routes in OpenAI's shape, called with OpenAI's client."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image
from support.fake_engine import FakeEngine
from support.hostile_images import encoded
from support.served_app import client, served

from tasks.serve.api.keys import Keys

KEY = "a-key-of-the-client"
PNG = encoded(Image.new("RGB", (64, 64), "red"), "PNG")


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(step_s=0)


@pytest.fixture(scope="module")
def sdk(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with served(engine, keys=Keys([KEY])) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def image_of(data: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def test_models_list_the_served_databases(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [
        f"knn-diffusion:{name}" for name in ("birds", "fish", "flowers")
    ]
    assert sdk.models.retrieve("knn-diffusion:fish").owned_by == "knn-diffusion"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("knn-diffusion:trees")


def test_model_name_chooses_the_database(sdk: openai.OpenAI) -> None:
    options = {"negative_prompt": "a branch", "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 1}
    images = {}
    for name in ("birds", "fish"):
        answer = sdk.images.with_raw_response.generate(
            model=f"knn-diffusion:{name}",
            prompt="an owl",
            n=2,
            response_format="b64_json",
            size="auto",
            extra_body=options,
        )
        assert answer.headers["X-Database"] == name
        found = answer.parse()
        assert (found.size, found.output_format) == ("64x64", "png")
        assert found.model_extra["database"]["name"] == name
        assert found.model_extra["settings"] | {"steps": 2, "guidance": 2.0, "seed": 1} == found.model_extra["settings"]
        assert [one.model_extra["seed"] for one in found.data] == [1, 2]
        assert found.data[0].model_extra["neighbours"][0]["url"].startswith(f"https://images.example/{name}/")
        images[name] = [image_of(one) for one in found.data]
    assert images["birds"][0].size == (64, 64)
    assert images["birds"][0].tobytes() != images["fish"][0].tobytes()


def test_swap_is_seen_by_the_next_request(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    def version() -> str:
        raw = sdk.images.with_raw_response.generate(model="knn-diffusion:flowers", prompt="a rose")
        return str(raw.headers["X-Database-Version"])

    before = version()
    engine.swap("flowers", 2)
    assert (before, version()) == ("1", "2")


def test_edit_takes_a_file(sdk: openai.OpenAI) -> None:
    found = sdk.images.edit(
        model="knn-diffusion:fish",
        image=("red.png", PNG),
        prompt="blue",
        n=2,
        extra_body={"seed": 3, "guidance_scale": 2},
    )
    assert [one.model_extra["seed"] for one in found.data] == [3, 4]
    assert image_of(found.data[0]).size == (64, 64)
    assert found.data[0].model_extra["region"]


def test_default_model_is_the_first_database(sdk: openai.OpenAI) -> None:
    assert sdk.images.generate(prompt="an owl").model_extra["database"]["name"] == "birds"
    assert sdk.images.generate(model="knn-diffusion", prompt="an owl").model_extra["database"]["name"] == "birds"


@pytest.mark.parametrize("name", ["dall-e-3", "knn-diffusion:trees", "knn-diffusion:", "x:birds", "a" * 150])
def test_unknown_model_is_not_found(sdk: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        sdk.images.generate(model=name, prompt="an owl")
    assert raised.value.code in ("model_not_found", "unknown_database")
    assert raised.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"n": 17}, "n"),
        ({"size": "1024x1024"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "webp"}, "output_format"),
        ({"extra_body": {"unknown": 1}}, "unknown"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
    ],
)
def test_invalid_field_is_a_bad_request(sdk: openai.OpenAI, options: dict[str, Any], field: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.images.generate(**{"prompt": "an owl"} | options)
    assert raised.value.param == field
    assert field in str(raised.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"image": ("a.png", b"no image")}, "image"),
        ({"image": [("a.png", PNG), ("b.png", PNG)]}, "image"),
        ({"mask": ("a.png", PNG)}, "mask"),
        ({"n": 99}, "n"),
    ],
)
def test_invalid_form_is_a_bad_request(sdk: openai.OpenAI, options: dict[str, Any], field: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.images.edit(**{"image": ("a.png", PNG), "prompt": "blue"} | options)
    assert raised.value.param == field


def test_wrong_key_is_an_authentication_error(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="unknown").images.generate(prompt="an owl")


def test_overload_and_fault_are_errors_that_the_client_retries() -> None:
    engine = FakeEngine(capacity=1, step_s=0)
    engine.gate.clear()
    with client(engine) as calls:
        for _ in range(3):
            calls.post("/v1/jobs", json={"kind": "generate", "prompt": "a"})
        full = calls.post("/v1/images/generations", json={"prompt": "a"})
        assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
        assert full.headers["Retry-After"]
        engine.fault = RuntimeError("secret")
        engine.gate.set()
        while any(not job.future.done() for job in engine.submitted):
            pass
        failed = calls.post("/v1/images/generations", json={"prompt": "a"})
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in failed.text


@pytest.mark.parametrize("content", [b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"])
def test_malformed_form_is_refused(content: bytes) -> None:
    with client() as calls:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        response = calls.post("/v1/images/edits", content=content, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert calls.post("/v1/images/edits", json={}).status_code == 415
