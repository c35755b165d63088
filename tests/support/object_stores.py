"""Object stores for tests: moto, and a real RadosGW, on loopback."""

import contextlib
import itertools
import json
import os
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

REGION = "us-east-1"
KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": REGION}
START_S3 = Path(__file__).parents[1] / "services/start-s3.sh"


class Bucket:
    """A bucket with its own client, independent of fsspec, to check the stored objects."""

    def __init__(self, name: str, store: "ObjectStore | RadosGateway", client: Any) -> None:
        self.name, self.uri, self.store, self._client = name, f"s3://{name}", store, client

    def keys(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=key)

    def forbid_deletion(self, keys: str) -> None:
        """Deny the deletion of objects whose keys match."""
        denied = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
        policy = {"Version": "2012-10-17", "Statement": [denied | {"Resource": f"arn:aws:s3:::{self.name}/{keys}"}]}
        self._client.put_bucket_policy(Bucket=self.name, Policy=json.dumps(policy))

    def parts(self, key: str) -> int:
        """Return the number of upload parts of an object; 1 for a plain upload."""
        tag = self._client.head_object(Bucket=self.name, Key=key)["ETag"].strip('"')
        return int(tag.partition("-")[2] or 1)

    def uploads(self) -> list[tuple[str, str]]:
        """Return key and id of each unfinished multipart upload."""
        begun = self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return [(upload["Key"], upload["UploadId"]) for upload in begun]

    def abort(self, key: str, upload: str) -> None:
        self._client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload)


class ObjectStore:
    """S3 of moto on 127.0.0.1; it accepts any credentials, except inside :meth:`locked`."""

    keys = KEYS

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.endpoint = "http://{}:{}".format(*self._server.get_host_and_port())
        self._client = client(self.endpoint, "owner", "secret")
        self._numbers = itertools.count()

    def bucket(self) -> Bucket:
        """Create an empty bucket."""
        name = f"bucket-{next(self._numbers)}"
        self._client.create_bucket(Bucket=name)
        return Bucket(name, self, self._client)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Reject all credentials in the block."""
        self._admit_unknown("0")
        try:
            yield
        finally:
            self._admit_unknown("inf")

    def stop(self) -> None:
        self._server.stop()

    def _admit_unknown(self, requests: str) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth", data=requests.encode(), headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request).close()


class RadosGateway:
    """Client of the Ceph RadosGW that ``make test-s3`` starts."""

    def __init__(self) -> None:
        self.endpoint = os.environ["AWS_ENDPOINT_URL"]
        self.keys = {name: os.environ[name] for name in KEYS}
        self._user = (self.keys["AWS_ACCESS_KEY_ID"], self.keys["AWS_SECRET_ACCESS_KEY"])
        self._client = client(self.endpoint, *self._user)
        self._conf = f"{os.environ['S3_STORE_DIR']}/ceph.conf"

    def bucket(self) -> Bucket:
        """Create an empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self._client.create_bucket(Bucket=name)
        return Bucket(name, self, self._client)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Revoke the key of the user in the block."""
        self._admin("key", "rm", "--access-key", self._user[0])
        try:
            yield
        finally:
            self._admin("key", "create", "--access-key", self._user[0], "--secret-key", self._user[1])

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze the server in the block: it accepts connections and does not answer."""
        self._script("freeze")
        try:
            yield
        finally:
            self._script("thaw")

    def is_up(self) -> bool:
        """Return True if the server answers."""
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Kill the server."""
        self._script("kill")

    def revive(self) -> None:
        """Restart the server at the same address, and wait until it answers."""
        self._script("revive")

    def _admin(self, *arguments: str) -> None:
        command = ["radosgw-admin", "-c", self._conf, *arguments, "--uid", "tests"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def _script(self, command: str) -> None:
        subprocess.run([START_S3, command], check=True, timeout=120)


def client(endpoint: str, key: str, secret: str) -> Any:
    """Return a boto3 client with buckets in the path, because a loopback address has no subdomains."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(s3={"addressing_style": "path"}),
    )


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """Return the message of an error, and check that it is one line."""
    message = str(caught.value)
    assert message and "\n" not in message
    return message
