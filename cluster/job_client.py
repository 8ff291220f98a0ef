"""Ray's client of a job server, such that a person who gives a wrong address hears of it soon."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.addresses import token_hint

__all__ = ["JobClient", "connect", "last_line"]

FIRST_TIMEOUT = (4, 5)
"""Seconds to connect, and to wait for an answer, when it isn't known yet whether anything is there."""
TIMEOUT = (10, 120)
"""The same afterwards: a head that is busy, a package that is large."""
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.authentication.authentication_token_setup",
)
"""Loggers of Ray's client, each of which sets its own level."""


class JobClient(JobSubmissionClient):
    """Ray's client, which by itself waits for ever for a server that doesn't answer."""

    timeout: tuple[float, float] = FIRST_TIMEOUT

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": self.timeout, **options})

    def request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        """Ask for what Ray's client has no method for."""
        return self._do_request(method, endpoint, **options)


def connect(address: str) -> JobClient:
    """The client of the job server at an address.

    Raises:
        ValueError: when none answers, when it wants another token, or when the cluster runs another version of Ray.
    """
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        client, version = _open(address)
    except AuthenticationError:
        raise ValueError(f"--address: {address} refuses requests without the cluster's token; {token_hint()}") from None
    except (requests.exceptions.Timeout, ConnectionError, requests.exceptions.ConnectionError) as error:
        slow = isinstance(error, requests.exceptions.ReadTimeout)
        what = f"something at {address} takes connections and doesn't answer" if slow else f"nothing answers at {address}"
        raise ValueError(f"--address: {what}; {_where_to_look(address)}") from None
    except (RuntimeError, requests.exceptions.RequestException, KeyError) as error:
        raise ValueError(f"--address: what answers at {address} is no job server of Ray's ({last_line(error)})") from None
    if version != ray.__version__:
        raise ValueError(
            f"--address: the cluster at {address} runs Ray {version}, and this is prefray for Ray {ray.__version__}; "
            "use a cluster of that version"
        )
    client.timeout = TIMEOUT
    return client


def _open(address: str) -> tuple[JobClient, str]:
    """A client, and the version of Ray that answers it.

    Where a token is asked for, the one that this machine has is sent, as Ray's drivers do: Ray itself writes one to `~/.ray` as
    soon as it has been started here, and clusters that are started afterwards ask for it.
    """
    try:
        with _without("RAY_API_SERVER_ADDRESS"):  # Ray would prefer it to the address that is given
            client = JobClient(address)
        return client, client.request("GET", "/api/version").json()["ray_version"]
    except AuthenticationError:
        if "RAY_AUTH_MODE" in os.environ or not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
    return _open(address)


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Hide a variable of the environment for a moment."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _where_to_look(address: str) -> str:
    host = urlsplit(address).hostname
    if host in ("127.0.0.1", "localhost"):
        return "give --address, or bring the head's port 8265 here (ray dashboard, kubectl port-forward, ssh -L)"
    return "see that it is the dashboard's address (port 8265 by default) and that the dashboard listens beyond loopback"


def last_line(error: BaseException) -> str:
    """What an error says, in a line: Ray's end with the reason, after a traceback of the server's."""
    lines = [line for line in str(error).strip().rstrip(".").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
