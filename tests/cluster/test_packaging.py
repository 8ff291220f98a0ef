"""What of a working directory a job brings."""

from __future__ import annotations

import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from cluster.packaging import MOST, NEVER, list_package, literal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "recipe.yaml data/pairs.jsonl .env .env.local keys/id.pem .git/config .venv/bin/python a/__pycache__/x.pyc "
        "big/weights.bin ignored/x unwanted/y my-run/model.safetensors"
    ).split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("ignored/\n")
    (tmp_path / ".rayignore").write_text("unwanted\n")
    return tmp_path


def test_the_list_is_what_ray_packs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = list_package(folder, [literal("my-run")])
    archive = tmp_path_factory.mktemp("archive") / "package.zip"
    create_package(str(folder), archive, include_gitignore=True, excludes=[*NEVER, literal("my-run")])
    with ZipFile(archive) as packed:
        assert sorted(package.files) == sorted(name for name in packed.namelist() if not name.endswith("/"))
        assert package.files == {info.filename: info.file_size for info in packed.infolist() if info.filename in package.files}
        contents = {name: packed.read(name) for name in package.files}
    package.write(ours := archive.with_name("ours.zip"))
    with ZipFile(ours) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == contents
    assert sorted(package.files) == [".gitignore", ".rayignore", "big/weights.bin", "data/pairs.jsonl", "recipe.yaml"]
    assert package.size == sum(package.files.values()) > 0


def test_a_pattern_means_just_its_path(tmp_path: Path) -> None:
    for name in ("a[1]/x", "a1/x", "sub/a[1]/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(list_package(tmp_path, [literal("a[1]")]).files) == ["a1/x", "sub/a[1]/x"]


def test_too_large_a_package_names_the_biggest_files(folder: Path) -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert MOST == DASHBOARD_CLIENT_MAX_SIZE
    with (folder / "big" / "weights.bin").open("wb") as file:
        file.truncate(101 << 20)
    with pytest.raises(ValueError, match=r"--working-dir: .* has 101\.0 MiB in 6 files, .* at most 100\.0 MiB") as caught:
        list_package(folder).check()
    assert "the biggest: big/weights.bin (101.0 MiB), my-run/model.safetensors" in str(caught.value)
    assert ".rayignore" in str(caught.value)
    list_package(folder, ["big"]).check()


def test_this_repository_is_a_small_package() -> None:
    """As it is checked out: what a developer has beside it is git-ignored."""
    package = list_package(ROOT)
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert package.size < 5 << 20
    assert {"pipeline/__main__.py", "cluster/templates/slurm.sh", "pipeline/report/page.html.j2"} <= set(package.files)
    assert not [name for name in package.files if name.startswith(("tests/", "benchmarks/", ".git/", ".venv/"))]
    assert {name for name in known if name.startswith(("cluster/", "pipeline/", "strategies/"))} <= set(package.files)


def test_files_with_secrets_stay(tmp_path: Path) -> None:
    secret = (
        ".env .env.local .envrc .netrc .pgpass .git-credentials .ray/auth_token .cache/huggingface/token .aws/credentials "
        ".config/gcloud/application_default_credentials.json .docker/config.json .ssh/id_rsa keys/id_ed25519 keys/server.key "
        "keys/ca.pem .azure/accessTokens.json .kube/config"
    )
    for name in (*secret.split(), "recipe.yaml", "keys/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(list_package(tmp_path).files) == ["keys/readme.txt", "recipe.yaml"]


def test_a_folder_that_is_no_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.packaging.TOO_MANY", 3)
    for number in range(5):
        (tmp_path / str(number)).touch()
    with pytest.raises(ValueError, match=r"has more than 3 files; name the folder that holds recipe and data"):
        list_package(tmp_path)
