"""Manifests say what a run needs, and whoever reads them takes them."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from cluster.manifests import MANIFESTS, ManifestRequest, kuberay
from tests.cluster.manifest_requests import RECIPE, REQUESTS, request_for

KUBERNETES = "kubernetes-json-schema/v1.37.0-local-strict"


def kubernetes_schema(name: str) -> Any:
    return json.loads(files("kubernetes_validate").joinpath(KUBERNETES, f"{name}.json").read_text())


@pytest.fixture(scope="module")
def definitions() -> Registry[Any]:
    return Resource.from_contents(kubernetes_schema("_definitions")) @ Registry()


@pytest.fixture(scope="module")
def ray_job_schema(definitions: Registry[Any]) -> Draft202012Validator:
    schema = yaml.safe_load(Path(__file__).with_name("rayjob_v1.schema.yaml").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, registry=definitions)


def errors(schema: Draft202012Validator, document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in schema.iter_errors(document)]


def documents(request: ManifestRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    recipe, job = yaml.safe_load_all(kuberay(request))
    return recipe, job


def cluster_of(request: ManifestRequest) -> dict[str, Any]:
    return documents(request)[1]["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("name", REQUESTS)
def test_kubernetes_takes_every_document(name: str, ray_job_schema: Draft202012Validator, definitions: Registry[Any]) -> None:
    recipe, job = documents(REQUESTS[name])
    config_map = Draft202012Validator(kubernetes_schema("configmap-v1"), registry=definitions)
    assert errors(config_map, recipe) == []
    assert errors(ray_job_schema, job) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.entryPoint", "x", "'entryPoint' was unexpected"),
        ("spec.preRunningDeadlineSeconds", 60, "'preRunningDeadlineSeconds' was unexpected"),
        ("spec.backoffLimit", "0", "'0' is not of type 'integer'"),
        ("spec.submissionMode", "JobMode", "'JobMode' is not one of"),
        ("spec.rayClusterSpec.authOptions.mode", "on", "'on' is not one of"),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeout", 5, "'idleTimeout' was unexpected"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.container", [], "'container' was unexpected"),
        (
            "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.volumeMounts.0.path",
            "/x",
            "'path' was unexpected",
        ),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", None, "None is not of type 'integer'"),
    ],
)
def test_the_schema_catches_mistakes(path: str, value: Any, message: str, ray_job_schema: Draft202012Validator) -> None:
    job = copy.deepcopy(documents(REQUESTS["elastic"])[1])
    *parents, last = path.split(".")
    node: Any = job
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    node[last] = value
    found = errors(ray_job_schema, job)
    assert len(found) == 1 and message in found[0]


def test_what_is_missing_is_caught(ray_job_schema: Draft202012Validator) -> None:
    job = copy.deepcopy(documents(REQUESTS["elastic"])[1])
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["name"]
    assert sorted(error.rpartition(": ")[2] for error in errors(ray_job_schema, job)) == [
        "'groupName' is a required property",
        "'name' is a required property",
    ]


def test_the_recipe_is_on_the_head_as_it_was_given() -> None:
    recipe, job = documents(REQUESTS["four GPU workers"])
    assert recipe["data"] == {"recipe.yaml": RECIPE}
    assert job["spec"]["entrypoint"] == "python -m pipeline train /etc/prefray/recipe.yaml"
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "recipe", "configMap": {"name": recipe["metadata"]["name"]}} in head["volumes"]
    assert {"name": "recipe", "mountPath": "/etc/prefray"} in head["containers"][0]["volumeMounts"]
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert [volume["name"] for volume in workers["volumes"]] == ["shm", "shared"]


def test_a_run_goes_on_where_asked_for() -> None:
    words = {
        command: documents(request_for(command=command, resume=True))[1]["spec"]["entrypoint"] for command in ("train", "tune")
    }
    assert words == {
        "train": "python -m pipeline train /etc/prefray/recipe.yaml --resume",
        "tune": "python -m pipeline tune --resume /mnt/shared/run",
    }


def test_nodes_are_sized_for_the_run() -> None:
    cluster = cluster_of(REQUESTS["four GPU workers"])
    group = cluster["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    pod = group["template"]["spec"]
    amounts = {"cpu": 8, "memory": "96Gi", "nvidia.com/gpu": 1}
    assert pod["containers"][0]["resources"] == {"requests": amounts, "limits": amounts}
    assert pod["volumes"][0] == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "48Gi"}}
    assert "enableInTreeAutoscaling" not in cluster
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_a_node_without_a_known_memory() -> None:
    def memory(request: ManifestRequest) -> str:
        containers = cluster_of(request)["workerGroupSpecs"][0]["template"]["spec"]["containers"]
        return containers[0]["resources"]["limits"]["memory"]

    assert memory(REQUESTS["one CPU worker"]) == "16Gi"
    assert memory(REQUESTS["elastic"]) == "128Gi"


def test_an_elastic_run_has_an_autoscaler() -> None:
    cluster = cluster_of(REQUESTS["elastic"])
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    group = cluster["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 4)


def test_the_claim_and_the_secret_are_on_every_node_and_no_secret_is_written() -> None:
    cluster = cluster_of(REQUESTS["elastic"])
    for pod in (cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]):
        container = pod["containers"][0]
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": "scratch"}} in pod["volumes"]
        assert {"name": "shared", "mountPath": "/mnt/shared"} in container["volumeMounts"]
        assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
        assert "env" not in container


def test_the_cluster_goes_with_the_job_and_asks_for_a_token() -> None:
    spec = documents(REQUESTS["one CPU worker"])[1]["spec"]
    assert (spec["shutdownAfterJobFinishes"], spec["backoffLimit"]) == (True, 0)
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}


@pytest.mark.parametrize("name", ["Train", "1st", "a" * 48, "ends-", "two words"])
def test_names_that_kuberay_does_not_take(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--name: KubeRay takes up to 47 lower-case .* no dash last; got '{name}'"):
        kuberay(request_for(name=name))


def test_an_image_is_needed() -> None:
    with pytest.raises(ValueError, match="--image: which image do the nodes run"):
        kuberay(request_for(image=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"namespace": "Bad NS; rm"}, "--namespace: no name that Kubernetes takes .*: 'Bad NS; rm'"),
        ({"claim": "Bad_Claim!", "mount": "/mnt/shared"}, "--claim: no name that Kubernetes takes"),
        ({"secret": "x y"}, "--secret: no name that Kubernetes takes"),
        ({"claim": "c", "mount": "/"}, "--mount: '/' would hide what the image has there"),
        ({"image": "a b; x"}, "--image: which image do the nodes run"),
    ],
)
def test_what_kubernetes_does_not_take(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        kuberay(request_for(**changes))


def test_commands_are_for_the_namespace() -> None:
    assert "kubectl -n lab apply -f FILE" in kuberay(request_for(namespace="lab"))
    assert "kubectl apply -f FILE" in kuberay(request_for())


@pytest.mark.parametrize("target", MANIFESTS)
@pytest.mark.parametrize("name", REQUESTS)
def test_every_manifest_says_how_to_start_and_to_end(target: str, name: str) -> None:
    text = MANIFESTS[target](REQUESTS[name])
    assert "# Start:  " in text and "# End:    " in text and text.endswith("\n")
