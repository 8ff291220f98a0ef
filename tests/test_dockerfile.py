"""The image's recipe, as far as it can be looked at without building: what it copies is there, what it installs is pinned."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line.strip()]


def is_ignored(path: str) -> bool:
    """By .dockerignore, whose patterns here have no exceptions: a pattern that matches a folder matches all that is in it."""
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert not any(pattern.startswith(("!", "#")) for pattern in patterns)
    parts = path.split("/")
    at_the_root = [pattern for pattern in patterns if not pattern.startswith("**/")]
    anywhere = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    return any(fnmatch(parts[0], pattern) for pattern in at_the_root) or any(
        fnmatch(part, pattern) for part in parts for pattern in anywhere
    )


def copied() -> list[str]:
    return [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]


def test_every_instruction_is_one() -> None:
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER"}
    assert {word for word, _ in instructions()} == known
    assert instructions()[0] == ("FROM", "python:3.11-slim")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    assert copied() == ["constraints.txt", "pyproject.toml", "README.md", "LICENSE", "cluster", "pipeline", "strategies"]
    for source in copied():
        assert (ROOT / source).exists() and not is_ignored(source)


def test_everything_that_is_installed_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    named = {project["project"]["readme"], *project["project"]["license-files"], *packages}
    assert named <= set(copied())
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            found = [path.relative_to(ROOT).as_posix() for path in (ROOT / package).glob(pattern)]
            assert found and not any(is_ignored(path) for path in found)


def test_what_is_left_out() -> None:
    assert all(is_ignored(path) for path in (".git/config", ".venv/bin/python", "tests/tiny.py", "cluster/__pycache__/a.pyc"))


def test_torch_is_installed_first_and_all_by_the_constraints() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert installs == [
        "python -m pip install --constraint constraints.txt torch",
        "python -m pip install --constraint constraints.txt '.[trackers]'",
    ]
    order = [f"{word} {rest}" for word, rest in instructions()]
    assert order.index("COPY constraints.txt ./") < order.index(f"RUN {installs[0]}") < order.index("COPY pipeline ./pipeline")
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_nodes_run_as_the_user_who_may_write_to_the_claim() -> None:
    words = [f"{word} {rest}" for word, rest in instructions()]
    user = words.index("USER ray")
    groups = set(re.findall(r"fsGroup: (\d+)", (ROOT / "cluster/templates/kuberay.yaml").read_text()))
    assert len(groups) == 1
    assert f"--uid {groups.pop()} " in next(word for word in words[:user] if "useradd" in word)
    assert not any(word.startswith("USER") for word in words[user + 1 :])


def test_the_build_of_deepspeed_is_the_makefiles() -> None:
    assert "export DS_BUILD_OPS := 0" in (ROOT / "Makefile").read_text()
    environment = next(rest for word, rest in instructions() if word == "ENV")
    assert "DS_BUILD_OPS=0" in environment.split()
