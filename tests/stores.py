"""Stores that tests run against: real ones, on loopback or on disk."""

import contextlib
import itertools
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

REGION = "us-east-1"
KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": REGION}


class Bucket:
    """A bucket, and a client beside fsspec's: what it sees is what is stored."""

    def __init__(self, name: str, client: Any) -> None:
        self.name, self.uri, self._client = name, f"s3://{name}", client

    def keys(self) -> list[str]:
        return [entry["Key"] for entry in self._client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def read(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=key)


class ObjectStore:
    """moto's S3 on 127.0.0.1: any credentials will do, save inside :meth:`locked`."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.endpoint = "http://{}:{}".format(*self._server.get_host_and_port())
        self._client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id="owner",
            aws_secret_access_key="secret",  # noqa: S106  # nothing behind it
        )
        self._numbers = itertools.count()

    def bucket(self) -> Bucket:
        """A new, empty one."""
        name = f"bucket-{next(self._numbers)}"
        self._client.create_bucket(Bucket=name)
        return Bucket(name, self._client)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Meanwhile nobody's credentials are known."""
        self._admit_unknown("0")
        try:
            yield
        finally:
            self._admit_unknown("inf")

    def stop(self) -> None:
        self._server.stop()

    def _admit_unknown(self, requests: str) -> None:
        asked = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth", data=requests.encode(), headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(asked).close()
