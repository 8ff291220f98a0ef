"""A real S3 server in this process, on a port of its own, that can go away and come back with what it holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto import settings
from moto.server import ThreadedMotoServer

__all__ = ["S3Server", "reach", "s3_server"]

BUCKET = "bucket"
REGION = "us-east-1"


class S3Server:
    """`uri("run")` lies in its one bucket; it takes the keys of its one user only."""

    def __init__(self, address: str) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._address, self._port = address, 0
        self.start()
        self.endpoint = f"http://{address}:{self._port}"
        self.variables = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": REGION, **_user(self.endpoint)}

    def start(self) -> None:
        self.is_running = True
        self._server = ThreadedMotoServer(ip_address=self._address, port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self.is_running = False
        self._server.stop()

    def uri(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    def objects(self) -> list[str]:
        """Everything in the bucket but the empty objects that stand for folders."""
        listed = boto3.client("s3").list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return [entry["Key"] for entry in listed if not entry["Key"].endswith("/")]

    def empty(self) -> None:
        """Leave nothing in the bucket; called by who has the keys."""
        store = boto3.client("s3")
        for entry in store.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            store.delete_object(Bucket=BUCKET, Key=entry["Key"])

    def download(self, folder: str, target: str) -> None:
        """Copy a folder of the bucket as another tool would."""
        client = boto3.client("s3")
        for key in self.objects():
            if key.startswith(f"{folder}/") and "/" not in key.removeprefix(f"{folder}/"):
                client.download_file(BUCKET, key, f"{target}/{key.rpartition('/')[2]}")


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


def _user(endpoint: str) -> dict[str, str]:
    """Make the bucket and a user who may do everything with it, while nobody is asked for keys yet."""
    anyone = {
        "endpoint_url": endpoint,
        "region_name": REGION,
        "aws_access_key_id": "anyone",
        "aws_secret_access_key": "anyone",
    }
    store = boto3.client("s3", **anyone)
    store.create_bucket(Bucket=BUCKET)
    users = boto3.client("iam", **anyone)
    name = f"trainer-{endpoint.rpartition(':')[2]}"
    users.create_user(UserName=name)
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    users.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=json.dumps(everything))
    key = users.create_access_key(UserName=name)["AccessKey"]
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
