"""Real S3 servers: one that all processes of the tests share, and ones of a process's own, that can go away and come back."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import psutil
import pytest
from moto import settings
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from tests.waiting import wait_for

__all__ = ["Bucket", "S3Server", "bucket_of", "reach", "s3_server", "start_shared"]

BUCKET = "bucket"
REGION = "us-east-1"
USERS = {"trainer": ["s3:*"], "reader": ["s3:Get*", "s3:List*", "s3:Head*"]}
"""User -> what it may do."""

_one_by_one = threading.Lock()
_put_object = S3Response.put_object


def _put_one_by_one(response: S3Response) -> Any:
    """Write as S3 does, where no other write comes between the look at a condition and the write."""
    with _one_by_one:
        return _put_object(response)


S3Response.put_object = _put_one_by_one


def _client() -> Any:
    """Of a session of its own: boto3's would keep the keys of another server."""
    return boto3.Session().client("s3")


@dataclass
class Bucket:
    """`uri("run")` lies in it. Its server takes the keys of two users only."""

    variables: dict[str, str]
    """Where it is, and the keys: for the environment of who is to reach it."""
    reader: dict[str, str]
    """Keys of a user who may only read."""
    name: str = BUCKET

    def uri(self, name: str) -> str:
        return f"s3://{self.name}/{name}"

    def objects(self) -> list[str]:
        """Everything in the bucket but the empty objects that stand for folders."""
        listed = _client().list_objects_v2(Bucket=self.name).get("Contents", [])
        return [entry["Key"] for entry in listed if not entry["Key"].endswith("/")]

    def content(self, key: str) -> bytes:
        """Bytes of an object."""
        return _client().get_object(Bucket=self.name, Key=key)["Body"].read()

    def empty(self) -> None:
        """Leave nothing in the bucket; called by who has the keys."""
        store = _client()
        for entry in store.list_objects_v2(Bucket=self.name).get("Contents", []):
            store.delete_object(Bucket=self.name, Key=entry["Key"])

    def download(self, folder: str, target: str) -> None:
        """Copy a folder of the bucket as another tool would."""
        client = _client()
        for key in self.objects():
            if key.startswith(f"{folder}/") and "/" not in key.removeprefix(f"{folder}/"):
                client.download_file(self.name, key, f"{target}/{key.rpartition('/')[2]}")


class S3Server(Bucket):
    """A server in this process, and its one bucket."""

    def __init__(self, address: str) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._address, self._port = address, 0
        self.start()
        endpoint = f"http://{address}:{self._port}"
        keys, reader = _users(endpoint)
        super().__init__({"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": REGION, **keys}, reader)

    def start(self) -> None:
        self.is_running = True
        self._server = ThreadedMotoServer(ip_address=self._address, port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self.is_running = False
        self._server.stop()

    def be_away(self, requests: int) -> None:
        """Stop, and come back when so many requests have found nobody."""
        self.stop()
        with socket.create_server((self._address, self._port)) as port:
            for _ in range(requests):
                port.accept()[0].close()
        self.start()


def start_shared(folder: Path) -> None:
    """Start a server for all processes of these tests, which ends with them; `folder` says how it is reached."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    words = [sys.executable, "-m", "tests.s3", str(owner), str(folder / "server.json")]
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(words, cwd=Path(__file__).parents[1], start_new_session=True, **silent)
    wait_for((folder / "server.json").exists)


@contextmanager
def bucket_of(folder: Path) -> Iterator[Bucket]:
    """A new bucket of the shared server, which this process, and only this one, finds in its environment."""
    bucket = Bucket(**json.loads((folder / "server.json").read_text()), name=f"b{uuid4().hex}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.variables.items():
            patch.setenv(name, value)
        _client().create_bucket(Bucket=bucket.name)
        yield bucket


def _serve(owner: int, file: Path) -> None:
    server = S3Server("127.0.0.1")
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    file.with_suffix(".partial").write_text(json.dumps({"variables": server.variables, "reader": server.reader}))
    file.with_suffix(".partial").rename(file)
    psutil.Process(owner).wait()


@contextmanager
def reach(server: S3Server) -> Iterator[S3Server]:
    """The server with an empty bucket; this process, and only this one, finds it and its keys in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        patch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        if not server.is_running:  # a test that took it away has failed
            server.start()
        server.empty()
        yield server


@contextmanager
def s3_server(address: str = "127.0.0.1") -> Iterator[S3Server]:
    """A server of one's own, which `reach` has reached."""
    server = S3Server(address)
    try:
        with reach(server):
            yield server
    finally:
        server.stop()


def _users(endpoint: str) -> Iterator[dict[str, str]]:
    """Make the bucket and its users, while nobody is asked for keys yet; yield their keys."""
    anyone = {
        "endpoint_url": endpoint,
        "region_name": REGION,
        "aws_access_key_id": "anyone",
        "aws_secret_access_key": "anyone",
    }
    store = boto3.client("s3", **anyone)
    store.create_bucket(Bucket=BUCKET)
    users = boto3.client("iam", **anyone)
    for user, actions in USERS.items():
        name = f"{user}-{endpoint.rpartition(':')[2]}"
        users.create_user(UserName=name)
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
        users.put_user_policy(UserName=name, PolicyName="s3", PolicyDocument=json.dumps(policy))
        key = users.create_access_key(UserName=name)["AccessKey"]
        yield {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]))
