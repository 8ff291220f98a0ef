"""Where a cluster's job server is, and who else can reach it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

__all__ = [
    "DEFAULT",
    "find_exposure",
    "is_http",
    "job_server",
    "listens_openly",
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
    """Whether it is a job server's address, and not one that drivers join a cluster by."""
    return address is not None and address.startswith(("http://", "https://"))


def job_server(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The address of the job server, as `ray job submit` finds it: given, of the environment, or this machine's.

    Raises:
        ValueError: for an address of another kind.
    """
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


def find_exposure(address: str) -> str | None:
    """What is wrong with talking to this job server without a token, or None: whoever reaches it can run programs there."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return None
    host = urlsplit(address).hostname or ""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:  # whoever connects will say so
        return None
    if not any(ipaddress.ip_address(str(number).partition("%")[0]).is_global for number in found):
        return None
    return (
        f"{host} is a public address, and requests carry no token: whoever reaches the job server can run programs on the "
        "cluster; start it with RAY_AUTH_MODE=token, or reach it through a tunnel (ray dashboard, kubectl port-forward, ssh -L)"
    )


def listens_openly(url: str) -> bool:
    """Whether a dashboard, as the cluster names it, listens beyond its machine and asks for no token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return False
    host = urlsplit(url if "://" in url else f"http://{url}").hostname or ""
    return host != "localhost" and not (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def why_unreachable(address: str) -> str | None:
    """Why nothing can be reached at `HOST:PORT`, or None; other ways of writing where a cluster is aren't looked at."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return None


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def token_hint() -> str:
    """What to do where a job server wants a token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return "the token that was sent is not the cluster's; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the right one"
    return "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (or ~/.ray/auth_token)"


def why_refused(address: str) -> str | None:
    """What keeps this process from joining a cluster that answers, in a phrase; None where nothing is known to. Imports Ray.

    Ray itself asks for half a minute, and then says that it failed to connect.

    Args:
        address: HOST:PORT of the cluster's GCS.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel  # with this process's token; there is no public way
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    advice = (
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token (on its head: "
        "`ray get-auth-token`)"
    )
    try:
        with init_grpc_channel(address) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=CONNECT_WITHIN_S)
    except AuthenticationError:
        return f"RAY_AUTH_MODE is token, and there is none: {advice}"
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return f"it asks for a token, and takes none that this process has: {advice}"
    return None
