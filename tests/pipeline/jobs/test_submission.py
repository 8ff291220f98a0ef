"""What a job brings and runs, and what is refused before anything is sent."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.packaging import list_package
from pipeline import submit
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.jobs.recipe_paths import check_path
from pipeline.jobs.submission import Submission, plan_job, send
from pipeline.ray.session import our_packages

RECIPE = {
    "base_model": "org/model",
    "datasets": [{"path": "data/pairs.jsonl"}],
    "output_dir": "/mnt/shared/run",
    "dataset_prepared_path": "/mnt/shared/prepared",
}
CLEAN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_REGION", "HF_TOKEN")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLEAN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "pairs.jsonl").write_text("{}\n")
    write(folder, {})
    monkeypatch.chdir(folder)
    return folder


def write(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))


def plan(**given: Any) -> Any:
    return plan_job(Submission(**{"command": "train", "recipe": "recipe.yaml", **given}))


def modules(planned: Any) -> list[str]:
    return planned.job["runtime_env"]["py_modules"]


def test_a_packaged_recipe_comes_with_the_modules(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(recipe="simpo", overrides=("output_dir=/mnt/shared/run",))
    assert planned.job["entrypoint"] == "python -m pipeline train simpo --set output_dir=/mnt/shared/run"
    assert planned.job["metadata"]["recipe"] == "simpo"
    assert planned.cfg.rl == "simpo"
    (folder,) = [path for path in map(Path, modules(planned)) if path.name == "pipeline"]
    assert (folder / "recipes" / "simpo.yaml").is_file()
    (project / "simpo").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    assert plan(recipe="simpo", working_dir=project).cfg.base_model == "org/model"
    with pytest.raises(UserError, match="sinpo: can't be read: no such file, and no packaged recipe; there are: .*simpo"):
        plan(recipe="sinpo")


def test_the_job_runs_the_words_that_were_given(project: Path) -> None:
    planned = plan(overrides=("rl_beta=0.2", "datasets.0.split=train[:10]"), flags=("--resume",))
    words = "python -m pipeline train recipe.yaml --set rl_beta=0.2 --set 'datasets.0.split=train[:10]' --resume"
    assert planned.job["entrypoint"] == words
    assert planned.package.root == project
    assert sorted(planned.package.files) == ["data/pairs.jsonl", "recipe.yaml"]
    assert {Path(folder).name for folder in modules(planned)} == {"cluster", "pipeline", "strategies"}
    assert planned.job["runtime_env"] == {
        "py_modules": [str(folder) for folder in our_packages()],
        "excludes": ["__pycache__"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"},
    }
    assert planned.job["submission_id"].startswith("train-recipe-") and planned.notes == []


def test_a_sweep_goes_on_from_its_folder(project: Path) -> None:
    write(project, {"tune": {"space": {"rl_beta": {"grid": [0.1]}}}})
    assert plan(command="tune", flags=("--resume",)).job["entrypoint"] == ("python -m pipeline tune --resume /mnt/shared/run")
    with pytest.raises(UserError, match="--set: a sweep goes on with the recipe in its folder"):
        plan(command="tune", flags=("--resume",), overrides=("rl_beta=1",))


def test_what_the_job_would_refuse_anyway(project: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml: has no `tune:` section to search; .* or submit train"):
        plan(command="tune")


def test_prepared_data_may_be_in_a_bucket(project: Path) -> None:
    planned = plan(overrides=("dataset_prepared_path=s3://bucket/prepared",))
    assert "dataset_prepared_path=s3://bucket/prepared" in planned.job["entrypoint"] and planned.notes == []


def test_a_cluster_can_be_looked_at_without_a_recipe(project: Path) -> None:
    planned, server = plan(command="doctor", recipe=None), Server([])
    assert planned.job["entrypoint"] == "python -m pipeline doctor" and "recipe" not in planned.job["metadata"]
    assert modules(planned) == [str(folder) for folder in our_packages()]
    send(planned, server, print)  # type: ignore[arg-type]
    assert server.asked == [(planned.job["submission_id"], None)]


def test_what_is_known_of_a_job(project: Path) -> None:
    facts = plan().job["metadata"]
    assert facts["command"] == "train" and facts["recipe"] == "recipe.yaml" and facts["output_dir"] == "/mnt/shared/run"
    assert "git_revision" not in facts
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=project, check=True)
    again = plan().job["metadata"]
    assert again["config_fingerprint"] == facts["config_fingerprint"] and len(again["git_revision"]) == 12
    write(project, {"rl_beta": 0.3})
    changed = plan().job["metadata"]
    assert changed["git_revision"] == f"{again['git_revision']}+changes"
    assert changed["config_fingerprint"] != facts["config_fingerprint"]
    assert plan(overrides=("rl_beta=0.3",)).job["metadata"]["config_fingerprint"] == changed["config_fingerprint"]


def test_only_named_variables_are_sent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    write(project, {"output_dir": "s3://bucket/run"})
    planned = plan()
    assert "secret" not in str(planned.job)
    assert [note.partition(":")[0] for note in planned.notes] == ["not sent", "not sent"]
    assert "AWS_SECRET_ACCESS_KEY" in planned.notes[0] and "HF_TOKEN" in planned.notes[1]
    named = plan(env=("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "A=b=c"))
    (note,) = named.notes
    assert note.startswith("sent: HF_TOKEN, AWS_SECRET_ACCESS_KEY; Ray shows a job's variables")
    sent = {"HF_TOKEN": "secret-token", "AWS_SECRET_ACCESS_KEY": "secret-key", "A": "b=c"}
    assert sent.items() <= named.job["runtime_env"]["env_vars"].items()
    with pytest.raises(UserError, match="--env NOT_SET: isn't set here"):
        plan(env=("NOT_SET",))
    with pytest.raises(UserError, match="--env 1: is no name of a variable"):
        plan(env=("1=x",))


def test_secrets_are_refused_on_the_command_line_and_left_out_of_what_is_known(project: Path) -> None:
    for override in ("overrides_of_model_kwargs.token=abc", "overrides_of_model_kwargs={token: abc}"):
        with pytest.raises(UserError, match=r"--set overrides_of_model_kwargs.*: would show a secret"):
            plan(overrides=(override,))


class Server:
    """A job server's view of its nodes."""

    def __init__(self, nodes: list[dict[str, float]], scales: bool = False) -> None:
        self._nodes, self._scales = nodes, scales
        self.asked: list[tuple[str, Any]] = []

    def nodes(self) -> list[dict[str, float]]:
        return self._nodes

    def has_autoscaler(self) -> bool:
        return self._scales

    def submit(self, job: dict[str, Any], package: Any, note: Any) -> str:
        self.asked.append((job["submission_id"], package))
        return job["submission_id"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overrides": ("ray.num_workers=3",)}, "3 workers of 1 CPU each don't fit: the cluster has 2 CPU on 2 nodes"),
        ({"command": "score", "overrides": ("ray.score.num_actors=50",)}, "50 actors of 1 CPU each don't fit"),
        ({"overrides": ("ray.score.num_actors=50",)}, "50 actors of 1 CPU each don't fit"),
        ({"reserved": {"GPU": 8.0}}, "no node of the cluster has 8 GPU, and the job would wait for ever"),
        ({"reserved": {"big": 1.0}}, "no node of the cluster has 1 big"),
        ({"overrides": ("ray.num_workers=2",), "reserved": {"CPU": 1.0}}, None),
        ({"command": "prepare", "overrides": ("ray.num_workers=3",)}, None),
    ],
)
def test_what_the_cluster_lacks(project: Path, given: dict[str, Any], message: str | None) -> None:
    planned, server = plan(name="job", **given), Server([{"CPU": 1.0}, {"CPU": 1.0}])
    if message is None:
        assert send(planned, server, print) == "job"  # type: ignore[arg-type]
        assert server.asked == [("job", planned.package)]
        return
    with pytest.raises(ValueError, match=message):
        send(planned, server, print)  # type: ignore[arg-type]
    assert server.asked == []
    assert send(planned, Server([], scales=True), print) == "job"  # type: ignore[arg-type]


def test_what_the_driver_reserves(project: Path) -> None:
    def arguments(**reserved: float) -> dict[str, Any]:
        job = plan(reserved=reserved).job
        return {name: amount for name, amount in job.items() if name.startswith("entrypoint_") and amount is not None}

    assert arguments() == {}
    assert arguments(CPU=1.0, GPU=0.5) == {"entrypoint_num_cpus": 1.0, "entrypoint_num_gpus": 0.5}
    assert arguments(memory=5, big=1.0) == {"entrypoint_memory": 5, "entrypoint_resources": {"big": 1.0}}


def test_a_recipe_elsewhere(project: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("base_model: m\n")
    with pytest.raises(UserError, match=r"recipe: '\.\./other\.yaml' is outside the working directory .*--working-dir DIR"):
        plan(recipe="../other.yaml")
    with pytest.raises(UserError, match=r"none\.yaml: can't be read: no such file"):
        plan(recipe="none.yaml")
    with pytest.raises(UserError, match="--working-dir: no such folder: 'nowhere'"):
        plan(working_dir=Path("nowhere"))
    (project / ".gitignore").write_text("*.yaml\n")
    with pytest.raises(UserError, match=r"recipe: 'recipe\.yaml' isn't packed: \.gitignore"):
        plan()


def test_a_recipe_is_looked_at_before_a_cluster_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe.yaml: can't be read: no such file"):
        submit("train", "recipe.yaml", address="http://127.0.0.1:9", working_dir=tmp_path)


def test_a_working_directory_elsewhere(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = plan(recipe="project/recipe.yaml", working_dir=Path("project"))
    assert planned.job["entrypoint"] == "python -m pipeline train recipe.yaml"
    assert plan(working_dir=Path("project")).job["entrypoint"] == planned.job["entrypoint"]


@pytest.mark.parametrize(
    ("value", "shared", "message"),
    [
        ("data/pairs.jsonl", None, None),
        ("data/p*.jsonl", None, None),
        ("data", None, r"'data' is packed in part: .*leaves 'data/ignored\.jsonl' out \(1 of 2 files\)"),
        ("org/dataset", None, None),
        ("/mnt/only/there.jsonl", None, None),
        (
            "OUTSIDE/x.jsonl",
            None,
            "is outside the working directory .* all that a job brings; copy it there, give a URI",
        ),
        ("OUTSIDE/x.jsonl", "OUTSIDE", None),
        ("../outside/x.jsonl", None, "is outside the working directory"),
        ("../outside/x.jsonl", "OUTSIDE", "is outside the working directory"),
        ("../nothing.jsonl", None, "is outside the working directory"),
        ("INSIDE/data/pairs.jsonl", None, "is another path on the cluster; write 'data/pairs.jsonl', or, if .*--shared"),
        ("INSIDE/data/pairs.jsonl", "INSIDE", None),
        ("data/ignored.jsonl", None, r"^'data/ignored\.jsonl' isn't packed: .*leaves it out"),
        ("data/*", None, r"^'data/ignored\.jsonl' isn't packed: .*leaves it out"),
    ],
)
def test_files_that_the_job_would_not_find(
    project: Path, tmp_path: Path, value: str, shared: str | None, message: str | None
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jsonl").touch()
    (project / "data" / "ignored.jsonl").touch()
    (project / ".gitignore").write_text("ignored.jsonl\n")

    def placed(text: str) -> str:
        return text.replace("OUTSIDE", str(tmp_path / "outside")).replace("INSIDE", str(project))

    folders = [] if shared is None else [Path(placed(shared))]
    problem = check_path(placed(value), list_package(project), folders)
    if message is None:
        assert problem is None
    else:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(problem)


def test_modules_that_the_job_would_not_find(project: Path) -> None:
    (project / "rewards").mkdir()
    for name in ("__init__", "length", "maths", "_notes"):
        (project / "rewards" / f"{name}.py").touch()
    (project / "words.py").touch()
    rewards = ["rewards.length.short", "words.polite", "rewards.best"]
    write(project, {"rl": "grpo", "trl": {"reward_funcs": rewards}, "datasets": [{"path": "data/pairs.jsonl"}]})
    (project / ".rayignore").write_text("words.py\nmaths.py\n_notes.py\n")
    with pytest.raises(UserError) as caught:
        plan()
    assert [line.partition(" .gitignore")[0] for line in str(caught.value).splitlines()] == [
        "trl.reward_funcs.1: 'words.py' isn't packed:",
        "trl.reward_funcs.2: 'rewards' is packed in part:",
    ]
    (project / ".rayignore").unlink()
    assert {"words.py", "rewards/maths.py"} <= plan().package.files.keys()


def test_every_key_that_names_a_file_is_looked_at(project: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    file = outside / "file.json"
    file.write_text("{}")
    changes = {
        "base_model": str(outside),
        "tokenizer_config": str(outside),
        "chat_template": "jinja",
        "chat_template_jinja": str(file),
        "datasets": [{"path": "json", "data_files": [str(file)]}, {"path": str(file)}],
        "test_datasets": [{"path": f"file://{file}"}],
    }
    write(project, changes)
    with pytest.raises(UserError) as caught:
        plan()
    named = [line.partition(": ")[0] for line in str(caught.value).splitlines()]
    assert named == [
        *("base_model", "tokenizer_config", "chat_template_jinja"),
        *("datasets.0.data_files", "datasets.1.path", "test_datasets.0.path"),
    ]
    assert plan(shared=(outside,)).package.root == project


def test_pictures_that_the_job_would_not_find(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the first rows of data on this machine name them."""
    monkeypatch.setenv("HOME", str(tmp_path / "outside"))
    for file in (tmp_path / "outside" / "a.png", project / "data" / "b.png", project / "data" / "b[1]*.png"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    part = {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/outside/a.png"}}
    found = {
        "b.png": None,
        "b[1]*.png": None,
        "https://host/a.png": None,
        "nothing.png": None,
        "/mnt/only/there.png": None,
        "../../outside/a.png": "is outside the working directory",
        f"{tmp_path}/outside/a.png": "is outside the working directory .* copy it there, give a URI",
        "~/a.png": "is outside the working directory .* copy it there, give a URI",
        f"{project}/data/b.png": "is another path on the cluster; write 'data/b.png'",
    }
    good = {"image": "b.png", "prompt": "?", "chosen": "a", "rejected": "b"}
    for value, message in found.items():
        (project / "data" / "pairs.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps({**good, 'image': value})}\n")
        if message is None:
            assert plan().package.root == project
        else:
            with pytest.raises(UserError, match=rf"^datasets\.0\.path: the picture of row 2, .*{message}"):
                plan()
    row = {**good, "image": None, "prompt": [{"role": "user", "content": [part]}]}
    (project / "data" / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="the picture of row 1, '.*outside/a.png' is outside"):
        plan()
    assert plan(shared=(tmp_path / "outside",)).package.root == project


def test_where_a_job_writes_what_has_a_relative_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config.paths import absolute_paths

    write(project, {"output_dir": "my-run", "dataset_prepared_path": "prepared"})
    for folder in ("my-run", "prepared"):
        (project / folder).mkdir()
        (project / folder / "weights").touch()
    planned = plan()
    assert not [name for name in planned.package.files if "weights" in name]
    assert planned.notes == [
        "output_dir: my-run will be ~/prefray/my-run on the cluster",
        "dataset_prepared_path: prepared will be ~/prefray/prepared on the cluster",
    ]
    package = project / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    package.mkdir(parents=True)
    cfg = load_config("recipe.yaml")
    assert absolute_paths(cfg).output_dir == str(project / "my-run")
    monkeypatch.chdir(package)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute_paths(cfg).output_dir == "/home/someone/prefray/my-run"
    assert absolute_paths(cfg).dataset_prepared_path == "/home/someone/prefray/prepared"
    other = load_config(project / "recipe.yaml", ["output_dir=s3://bucket/run", "dataset_prepared_path=/mnt/p"])
    assert absolute_paths(other).output_dir == "s3://bucket/run" and absolute_paths(other).dataset_prepared_path == "/mnt/p"


def test_a_run_that_starts_from_an_earlier_one_brings_it(project: Path) -> None:
    (project / "runs" / "sft" / "model").mkdir(parents=True)
    (project / "runs" / "sft" / "model" / "config.json").write_text("{}")
    write(project, {"base_model": "runs/sft/model", "output_dir": "runs"})
    assert "runs/sft/model/config.json" in plan().package.files


def test_a_folder_that_would_hide_ours(project: Path) -> None:
    (project / "pipeline").mkdir()
    (project / "pipeline" / "mine.py").touch()
    with pytest.raises(UserError, match="has a 'pipeline' of its own, which would hide prefray's package"):
        plan()
    (project / ".rayignore").write_text("pipeline\n")
    assert plan().job["entrypoint"] == "python -m pipeline train recipe.yaml"


def test_code_of_a_model_must_be_allowed_on_the_command_line(project: Path) -> None:
    write(project, {"trust_remote_code": True})
    with pytest.raises(UserError, match="trust_remote_code: runs Python code"):
        plan()
    assert plan(overrides=("trust_remote_code=true",)).job["entrypoint"].endswith("--set trust_remote_code=true")


def test_the_repository_itself_needs_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = our_packages()[0].parent
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "datasets": [{"path": "org/pairs"}]}))
    for package in our_packages():
        (tmp_path / package.name).symlink_to(package)
    (tmp_path / "pyproject.toml").symlink_to(root / "pyproject.toml")
    monkeypatch.chdir(root)
    monkeypatch.setattr("pipeline.jobs.submission.our_packages", lambda: [tmp_path / path.name for path in our_packages()])
    assert plan(working_dir=tmp_path).job["runtime_env"]["py_modules"] == []
