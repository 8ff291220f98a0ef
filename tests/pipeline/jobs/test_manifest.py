"""From a recipe to what its manifest is written from, and what is refused instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.manifests import MANIFESTS, ManifestOptions, ManifestRequest
from pipeline.cli import app
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.jobs.manifest import CARRIES_RECIPE, SEES_FILES, request_of

RECIPE: dict[str, Any] = {
    "base_model": "org/model",
    "rl": "dpo",
    "datasets": [{"path": "s3://bucket/pairs.jsonl", "type": "chatml.intel"}],
    "dataset_prepared_path": "/mnt/shared/prepared",
    "output_dir": "/mnt/shared/run",
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-5,
    "num_epochs": 1,
}
TUNE = {"space": {"rl_beta": {"choice": [0.1, 0.2]}}, "max_concurrent_trials": 3}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ask(
    recipe: dict[str, Any] | None = None, target: str = "kuberay", sets: tuple[str, ...] = (), **options: Any
) -> ManifestRequest:
    path = Path("my_DPO.yaml")
    path.write_text(yaml.safe_dump({**RECIPE, **(recipe or {})}))
    return request_of(load_config(path, sets), ManifestOptions(target, str(path), sets, image="img", **options))


def refused(recipe: dict[str, Any] | None = None, target: str = "kuberay", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        ask(recipe, target, **options)
    return str(caught.value)


def nodes(request: ManifestRequest) -> tuple[int, int]:
    return request.min_nodes, request.max_nodes


def node(request: ManifestRequest) -> tuple[int, int, int | None]:
    return request.cpus, request.gpus, request.memory


@pytest.mark.parametrize("target", MANIFESTS)
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ({"ray": {"use_gpu": False}}, {}),
        ({"ray": {"num_workers": 4}}, {}),
        ({"ray": {"num_workers": {"min": 1, "max": 4}}}, {}),
        ({"tune": TUNE}, {"command": "tune"}),
    ],
)
def test_every_manifest_is_written_from_every_recipe(target: str, recipe: dict[str, Any], options: dict[str, Any]) -> None:
    request = ask(recipe, target, region="us-west-2", worker_type="g6.4xlarge", **options)
    assert f"{request.options.command}-my-dpo" in MANIFESTS[target](request)


def test_every_manifest_says_what_it_carries() -> None:
    assert set(CARRIES_RECIPE) | set(SEES_FILES) == set(MANIFESTS)


def test_a_node_for_each_worker() -> None:
    request = ask({"ray": {"num_workers": 4}})
    assert (nodes(request), node(request), request.autoscales) == ((4, 4), (4, 1, None), False)


def test_workers_that_share_a_node() -> None:
    each = {"CPU": 3, "GPU": 2, "memory": 3 << 29}
    request = ask({"ray": {"num_workers": 5, "resources_per_worker": each}}, workers_per_node=2)
    assert (nodes(request), node(request)) == ((3, 3), (6, 4, 3))


def test_an_elastic_run() -> None:
    request = ask({"ray": {"num_workers": {"min": 1, "max": 4}}})
    assert (nodes(request), request.autoscales) == ((1, 4), True)
    assert nodes(ask({"ray": {"num_workers": {"min": 2, "max": 4}}}, workers_per_node=2, max_nodes=3)) == (1, 3)


def test_a_sweep_has_room_for_its_trials() -> None:
    recipe = {"tune": TUNE, "ray": {"num_workers": 2}}
    request = ask(recipe, command="tune")
    assert (nodes(request), request.sweep_file) == ((6, 6), "/mnt/shared/run/sweep.json")
    assert nodes(ask(recipe, command="tune", nodes=2, max_nodes=6)) == (2, 6)
    assert ask({**recipe, "output_dir": "s3://bucket/run"}, command="tune").sweep_file is None
    assert nodes(ask(recipe)) == (2, 2)


@pytest.mark.parametrize(
    ("ray", "gpu", "gpus"),
    [
        ({}, None, 1),
        ({}, False, 0),
        ({"use_gpu": False}, None, 0),
        ({"use_gpu": True}, None, 1),
        ({"resources_per_worker": {"gpu": 0.5}}, None, 1),
        ({"resources_per_worker": {"GPU": 0}}, None, 0),
    ],
)
def test_gpus(ray: dict[str, Any], gpu: bool | None, gpus: int) -> None:
    assert ask({"ray": ray}, gpu=gpu).gpus == gpus


def test_what_is_asked_for_wins() -> None:
    request = ask(cpus=12, memory=80, name="other", resume=True, claim="scratch", mount="/mnt")
    assert (node(request), request.name) == ((12, 1, 80), "other")
    assert (request.mount, ask(claim="scratch").mount, ask().mount) == ("/mnt", "/mnt/shared", None)


def test_overrides_are_in_the_recipe() -> None:
    written = yaml.safe_load(ask(sets=("rl_beta=0.25", "datasets.0.split=test")).recipe_text)
    assert (written["rl_beta"], written["datasets"][0]["split"]) == (0.25, "test")


@pytest.mark.parametrize("target", CARRIES_RECIPE)
def test_the_recipe_is_written_as_it_is_read(target: str) -> None:
    odd = "a\u2028b\x85c __NAME__ ü $HOME 'x' \"y\"\n\n  d  \n"
    text = MANIFESTS[target](ask({"chat_template_jinja": odd}, target))
    found = text.partition("<<'RECIPE'\n")[2].partition("\nRECIPE\n")[0]
    carried = next(yaml.safe_load_all(text))["data"]["recipe.yaml"] if target == "kuberay" else found
    assert yaml.safe_load(carried) == {**RECIPE, "chat_template_jinja": odd}


def test_the_command_line() -> None:
    Path("r.yaml").write_text(yaml.safe_dump({**RECIPE, "ray": {"use_gpu": True}}))

    def printed(*words: str) -> str:
        result = CliRunner().invoke(app, ["manifest", *words])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    shared = ("--set", "rl_beta=0.25", "--name", "n", "--nodes", "2", "--max-nodes", "3", "--cpus", "9", "--memory", "40")
    kuberay = printed("kuberay", "r.yaml", *shared, "--image", "img", "--claim", "c", "--secret", "s", "--namespace", "lab")
    config_map, job = yaml.safe_load_all(kuberay)
    assert config_map["metadata"]["name"] == "n-recipe" and "rl_beta: 0.25" in config_map["data"]["recipe.yaml"]
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"], job["metadata"]["namespace"]) == (2, 3, "lab")
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": 9, "memory": "40Gi", "nvidia.com/gpu": 1}
    assert container["envFrom"] == [{"secretRef": {"name": "s"}}]

    slurm = printed("slurm", "r.yaml", *shared, "--time", "20", "--setup", "a", "--setup", "b", "--partition", "p", "--resume")
    for line in ("#SBATCH --nodes=2-3", "#SBATCH --time=20", "set +u\na\nb\nset -u", "#SBATCH --partition=p"):
        assert f"{line}\n" in slurm
    assert 'start=(python -m pipeline train "$work/recipe.yaml" --resume)' in slurm

    written = printed(
        *("cluster", "r.yaml", "--provider", "local", "--head-ip", "10.0.0.1", "--worker-ip", "10.0.0.2"),
        *("--worker-ip", "10.0.0.3", "--ssh-user", "u", "--ssh-key", "k", "--output", "cluster.yaml"),
    )
    assert written == ""
    cluster = yaml.safe_load(Path("cluster.yaml").read_text())
    assert cluster["provider"]["worker_ips"] == ["10.0.0.2", "10.0.0.3"]
    assert cluster["auth"] == {"ssh_user": "u", "ssh_private_key": "k"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kuberay"], "prefray: --image: which image do the nodes run?"),
        (["slurm", "--output", "no/such/job.sh"], "prefray: --output: 'no/such/job.sh' can't be written: No such file"),
        (["cluster", "--provider", "ibm"], "prefray: --provider: unknown: 'ibm'; known: aws, gcp, azure, local"),
    ],
)
def test_what_is_wrong_is_one_message(words: list[str], message: str) -> None:
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    result = CliRunner().invoke(app, ["manifest", words[0], "r.yaml", *words[1:]])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(message)


def test_outputs_must_be_shared() -> None:
    for target in MANIFESTS:
        found = refused({"output_dir": "run", "dataset_prepared_path": "prepared"}, target)
        assert found.splitlines() == [
            f"{key}: {value!r} is relative, and each node would have its own; give a URI, or an absolute path on storage that "
            f"all nodes share: --set {key}=..."
            for key, value in (("output_dir", "run"), ("dataset_prepared_path", "prepared"))
        ]
    assert ask({"output_dir": "s3://bucket/run"}).output_dir == "s3://bucket/run"
    assert ask({"output_dir": "~/run"}, "slurm").output_dir == "~/run"
    assert "'~/run' is relative" in refused({"output_dir": "~/run"})


BUCKET = {
    "base_model": "s3://bucket/model",
    "reference_model": "org/reference",
    "dataset_prepared_path": "s3://bucket/prepared",
    "output_dir": "s3://bucket/run",
}


@pytest.mark.parametrize("target", MANIFESTS)
def test_a_bucket_needs_no_shared_storage(target: str) -> None:
    request = ask(BUCKET, target, region="us-west-2", worker_type="g6.4xlarge")
    text = MANIFESTS[target](request)
    assert (request.stores, request.shares_nothing) == ("s3", True)
    assert "persistentVolumeClaim" not in text and "--volume" not in text
    assert " share a bucket" in text and "AWS_ACCESS_KEY_ID" in text
    storage = {"claim": "scratch"} if target == "kuberay" else {"mount": "/mnt/shared"}
    assert "the nodes need no shared storage; leave it out" in refused(BUCKET, target, **storage)


@pytest.mark.parametrize(
    "recipe",
    [{"output_dir": "/mnt/shared/run"}, {"dataset_prepared_path": "/mnt/shared/p"}, {"base_model": "/mnt/shared/m"}],
)
def test_what_is_on_a_path_keeps_the_claim(recipe: dict[str, str]) -> None:
    request = ask({**BUCKET, **recipe}, claim="scratch")
    assert not request.shares_nothing
    assert MANIFESTS["kuberay"](request).count("claimName") == 2


def test_where_the_keys_of_a_store_come_from() -> None:
    assert "--secret NAME" in MANIFESTS["kuberay"](ask(BUCKET))
    assert "--secret NAME" not in MANIFESTS["kuberay"](ask(BUCKET, secret="bucket-keys"))
    google = {"output_dir": "gs://bucket/run", "datasets": [{"path": "org/pairs"}]}
    assert "called in: what the store's client reads" in MANIFESTS["slurm"](ask(google, "slurm"))
    assert ask({**google, "output_dir": "file:///mnt/run"}).stores is None


def test_outputs_must_be_on_the_claim() -> None:
    found = refused({"output_dir": "/mnt/shared/../home/run"}, claim="scratch")
    assert found.startswith("output_dir: '/mnt/shared/../home/run' isn't under /mnt/shared, which is all that the nodes share")


def test_files_that_the_nodes_will_not_have() -> None:
    Path("pairs.jsonl").touch()
    Path("model").mkdir()
    recipe = {"base_model": "model", "datasets": [{"path": "pairs.jsonl", "type": "chatml.intel"}]}
    assert refused(recipe, claim="scratch").splitlines() == [
        f"{key}: {value!r} is a file or folder here, and the nodes won't have it; give a URI, a hub id, or a path under "
        "/mnt/shared"
        for key, value in (("base_model", "model"), ("datasets.0.path", "pairs.jsonl"))
    ]
    assert "on storage that they mount (--claim)" in refused(recipe)
    assert "'./there' is a file or folder here" in refused({"base_model": "./there"})
    assert str(Path.cwd()) in refused({"base_model": str(Path("model").absolute())})
    for target in ("cluster", "slurm"):
        assert ask(recipe, target).name == "train-my-dpo"
    assert ask({"base_model": "/mnt/shared/model"}, claim="scratch").mount == "/mnt/shared"


@pytest.mark.parametrize("target", MANIFESTS)
def test_remote_code_is_allowed_on_the_command_line_alone(target: str) -> None:
    assert "trust_remote_code: runs Python code of the model's repository" in refused({"trust_remote_code": True}, target)
    assert "trust_remote_code: true" in ask(target=target, sets=("trust_remote_code=true",)).recipe_text


def test_secrets_are_not_written() -> None:
    recipe = {"output_dir": "s3://key:word@bucket/run"}
    assert refused(recipe) == refused(recipe, "slurm")
    assert refused(recipe).startswith("output_dir: a secret, which would stand in the manifest for everyone who may read it")
    assert "word" not in refused(recipe)
    assert ask(recipe, "cluster").output_dir == "s3://key:word@bucket/run"


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({}, {"command": "tune"}, "my_DPO.yaml: has no `tune:` section to search"),
        ({"ray": {"address": "10.0.0.1:6379"}}, {}, "ray.address: '10.0.0.1:6379' is another cluster"),
        ({"ray": {"num_workers": 4}}, {"nodes": 3}, "--nodes 3: the recipe needs 4 workers, 1 on a node, and so 4 nodes"),
        ({"ray": {"num_workers": 4}}, {"max_nodes": 3}, "--max-nodes 3: is less than the 4 nodes"),
        ({"ray": {"resources_per_worker": {"CPU": 8}}}, {"cpus": 6}, "--cpus 6: the workers of a node need 8"),
        ({"ray": {"resources_per_worker": {"tpu": 1}}}, {}, "ray.resources_per_worker.tpu: which nodes have it?"),
        ({"ray": {"use_gpu": True}}, {"gpu": False}, "--no-gpu: contradicts the recipe, whose workers have 1 GPUs each"),
        ({"ray": {"use_gpu": False}}, {"gpu": True}, "--gpu: contradicts the recipe, whose workers have 0 GPUs each"),
        ({}, {"mount": "/mnt"}, "--mount /mnt: what is to be mounted there?"),
        ({}, {"mount": "mnt", "claim": "scratch"}, "--mount mnt: must be an absolute path of the nodes, such as /mnt/shared"),
    ],
)
def test_what_does_not_go_together(recipe: dict[str, Any], options: dict[str, Any], message: str) -> None:
    assert refused(recipe, **options).startswith(message)
