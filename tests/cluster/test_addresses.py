"""Where a job server is, and who else reaches it."""

from __future__ import annotations

import pytest

from cluster.addresses import exposure_warning, is_public, job_server, token_hint


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("http://head:8265/", {"RAY_API_SERVER_ADDRESS": "http://other:1"}, "http://head:8265"),
        ("head:8265", {}, "http://head:8265"),
        ("https://head", {}, "https://head"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://b:2"}, "http://b:2"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
    ],
)
def test_the_address(given: str | None, environment: dict[str, str], address: str) -> None:
    assert job_server(given, environment) == address


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("auto", "--address: 'auto' is how drivers join a cluster"),
        ("ray://head:10001", "is how drivers join a cluster"),
        ("head:6379", "has the port by which nodes and drivers join a cluster; give the dashboard's"),
        ("ftp://head", "is no address of a job server"),
        ("http://", "is no address of a job server"),
        ("http://head:x", "is no address: .*; give the dashboard's"),
        ("http://me:secret@head:8265", "holds a password, which would be shown"),
    ],
)
def test_what_is_no_address_of_a_job_server(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        job_server(given, {})
    assert "secret@" not in str(caught.value)


def test_a_public_address_without_a_token_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    found = exposure_warning("http://34.120.1.2:8265")
    assert found is not None and "34.120.1.2 is a public address" in found and "RAY_AUTH_MODE=token" in found
    for private in (
        "http://127.0.0.1:8265",
        "http://10.1.2.3:8265",
        "http://192.168.0.7",
        "http://localhost:8265",
        "http://[::1]",
    ):
        assert exposure_warning(private) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert exposure_warning("http://34.120.1.2:8265") is None


def test_a_dashboard_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert is_public("10.0.0.1:8265") and is_public("http://head:8265")
    assert not is_public("127.0.0.1:8265") and not is_public("localhost:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert not is_public("10.0.0.1:8265")


def test_what_to_do_about_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token_hint().startswith("set RAY_AUTH_MODE=token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert token_hint().startswith("the token that was sent is not the cluster's")
