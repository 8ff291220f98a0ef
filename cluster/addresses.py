"""Where a cluster's job server is, and who else can reach it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from cluster.ray_compat import authenticated_channel

__all__ = [
    "DEFAULT",
    "exposure_warning",
    "is_http",
    "job_server",
    "is_public",
    "token_hint",
    "why_refused",
    "why_unreachable",
]

DEFAULT = "http://127.0.0.1:8265"
"""Where `ray start --head` and `ray dashboard` put it."""
CONNECT_WITHIN_S = 5
GCS_PORT = 6379
"""Of the address that drivers on the cluster join it by."""


def is_http(address: str | None) -> bool:
    """Return whether an address is a job server's, rather than one that drivers join a cluster by."""
    return address is not None and address.startswith(("http://", "https://"))


def job_server(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return the job server's address, found as `ray job submit` does: `given`, else the environment's, else this machine's.

    Raises:
        ValueError: for an address of another kind.
    """
    # RAY_ADDRESS counts below only as a URL: otherwise it is the address that drivers join by.
    address = given or environment.get("RAY_API_SERVER_ADDRESS")
    if address is None and is_http(environment.get("RAY_ADDRESS")):
        address = environment["RAY_ADDRESS"]
    address = address or DEFAULT
    shown = f"--address: {address!r}"
    advice = "give the dashboard's, such as http://HEAD:8265"
    if address in ("auto", "local") or address.startswith("ray://"):
        raise ValueError(f"{shown} is how drivers join a cluster; jobs go to its job server: {advice}")
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        # Read here, since `urlsplit` checks a port only when it is asked for it.
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{shown} is no address: {error}; {advice}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{shown} is no address of a job server; {advice}")
    if parts.password is not None:
        raise ValueError("--address: holds a password, which would be shown; give a token by RAY_AUTH_TOKEN")
    if port == GCS_PORT:
        raise ValueError(f"{shown} has the port by which nodes and drivers join a cluster; {advice}")
    return address.rstrip("/")


def exposure_warning(address: str) -> str | None:
    """Return a warning if a job server has a public address and no token is sent, so anyone can run programs; else None."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return None
    host = urlsplit(address).hostname or ""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:  # the connection attempt reports it
        return None
    # An IPv6 address of a link ends with its interface: fe80::1%eth0.
    if not any(ipaddress.ip_address(str(ip).partition("%")[0]).is_global for ip in addresses):
        return None
    return (
        f"{host} is a public address, and requests carry no token: whoever reaches the job server can run programs on the "
        "cluster; start it with RAY_AUTH_MODE=token, or reach it through a tunnel (ray dashboard, kubectl port-forward, ssh -L)"
    )


def is_public(url: str) -> bool:
    """Return whether a dashboard listens beyond loopback without requiring a token; `url` is the one the cluster reports."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return False
    host = urlsplit(url if "://" in url else f"http://{url}").hostname or ""
    with suppress(ValueError):  # a name
        return not ipaddress.ip_address(host).is_loopback
    return host != "localhost"


def why_unreachable(address: str) -> str | None:
    """Return why a TCP connection to `HOST:PORT` fails, or None; addresses of another form aren't checked."""
    # From the right: an IPv6 host has colons of its own, in brackets.
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return None


def token_hint() -> str:
    """Return advice for a job server that requires a token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return "the token that was sent is not the cluster's; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the right one"
    return "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (or ~/.ray/auth_token)"


def why_refused(address: str) -> str | None:
    """Return why a reachable cluster refuses this process, in a phrase; None where no reason is found. Imports Ray.

    Ray itself retries for half a minute, and then reports only that it failed to connect.

    Args:
        address: HOST:PORT of the cluster's GCS.
    """
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    advice = (
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token (on its head: "
        "`ray get-auth-token`)"
    )
    try:
        with authenticated_channel(address) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=CONNECT_WITHIN_S)
    except AuthenticationError:
        return f"RAY_AUTH_MODE is token, and there is none: {advice}"
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return f"it asks for a token, and takes none that this process has: {advice}"
    return None
