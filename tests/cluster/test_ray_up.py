"""Clusters for `ray up`: what is rendered is what Ray takes, and what it would refuse is refused at once."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ray.autoscaler._private.providers import _get_default_config

from cluster.manifests import PROVIDERS, check_cluster, ray_up
from tests.cluster.manifest_requests import NEEDS, request_for

MACHINES: dict[str, dict[str, Any]] = {
    "aws": {"provider": "aws", "region": "us-west-2", "worker_type": "g6.4xlarge"},
    "gcp": {
        "provider": "gcp",
        "region": "us-west1",
        "zone": "us-west1-a",
        "project": "lab",
        "worker_type": "g2-standard-8",
        "machine_image": "projects/x/y",
    },
    "azure": {"provider": "azure", "region": "westus2", "resource_group": "lab", "worker_type": "Standard_NC6s_v3"},
    "local": {"provider": "local", "head_ip": "10.0.0.1", "worker_ip": ("10.0.0.2", "10.0.0.3", "10.0.0.4")},
}
GPU_NODE = {"cpus": 8, "gpus": 1}


def test_every_provider_has_an_example_here() -> None:
    assert set(MACHINES) == set(PROVIDERS)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", NEEDS)
def test_ray_takes_what_is_rendered(provider: str, name: str) -> None:
    text = ray_up(request_for(**NEEDS[name], **MACHINES[provider]))
    check_cluster(yaml.safe_load(text))
    config = yaml.safe_load(text)
    assert config["provider"]["type"] == provider
    heads = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert len(heads) == 1 and heads[0].endswith("--dashboard-host=127.0.0.1")


def test_clouds_have_a_head_without_work_and_workers_for_the_run() -> None:
    config = yaml.safe_load(ray_up(request_for(**GPU_NODE, min_nodes=1, max_nodes=4, **MACHINES["aws"])))
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["worker"]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert (worker["min_workers"], worker["max_workers"], worker["resources"]) == (1, 4, {"CPU": 8, "GPU": 1})
    assert worker["node_config"]["InstanceType"] == "g6.4xlarge"
    assert head["node_config"]["InstanceType"] == "m6i.2xlarge"
    assert config["max_workers"] == 4


def test_each_provider_names_its_machines_in_its_own_way() -> None:
    def worker(provider: str, **changes: Any) -> dict[str, Any]:
        config = yaml.safe_load(ray_up(request_for(**GPU_NODE, **MACHINES[provider], **changes)))
        return config["available_node_types"]["worker"]["node_config"]

    assert worker("aws", machine_image="ami-1")["ImageId"] == "ami-1"
    gcp = worker("gcp")
    assert gcp["machineType"] == "g2-standard-8"
    assert gcp["disks"][0]["initializeParams"] == {"diskSizeGb": 256, "sourceImage": "projects/x/y"}
    azure = worker("azure", machine_image="canonical:ubuntu:22:latest")["azure_arm_parameters"]
    assert (azure["vmSize"], azure["imagePublisher"], azure["imageSku"]) == ("Standard_NC6s_v3", "canonical", "22")
    zones = [worker("azure", **zone)["azure_arm_parameters"]["availability_zone"] for zone in ({}, {"zone": "2"})]
    assert zones == ["none", "2"]


def test_machines_boot_what_ray_boots_unless_told_otherwise() -> None:
    def image(config: dict[str, Any]) -> Any:
        azure = config.get("azure_arm_parameters", {})
        disk = config["disks"][0]["initializeParams"] if "disks" in config else {}
        names = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
        return disk.get("sourceImage"), [azure.get(name) for name in names], config.get("ImageId")

    for provider in ("aws", "gcp", "azure"):
        config = yaml.safe_load(ray_up(request_for(**{**MACHINES[provider], "machine_image": None})))
        default = _get_default_config({"type": provider})
        expected = image(default["available_node_types"][default["head_node_type"]]["node_config"])
        found = [image(node["node_config"]) for node in config["available_node_types"].values()]
        assert found == [expected, expected]


def test_ones_own_machines_are_all_there_and_the_head_works_too() -> None:
    config = yaml.safe_load(ray_up(request_for(min_nodes=4, max_nodes=4, **MACHINES["local"])))
    assert (config["min_workers"], config["max_workers"]) == (3, 3)
    assert config["provider"]["worker_ips"] == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    assert "available_node_types" not in config


def test_the_image_and_the_shared_storage() -> None:
    def docker(**changes: Any) -> dict[str, Any]:
        return yaml.safe_load(ray_up(request_for(**changes)))["docker"]

    known = docker(memory=64, mount="/mnt/shared")
    assert known["image"] == "registry.example.org/prefray:1"
    assert known["run_options"][1:] == ["--shm-size=32g", "--volume /mnt/shared:/mnt/shared"]
    assert docker()["run_options"] == ["--ulimit nofile=65536:65536"]
    bare = ray_up(request_for(image=None, **MACHINES["local"]))
    assert "docker" not in yaml.safe_load(bare)
    assert "# Without an image every machine needs Python, Ray and prefray's packages, found by ubuntu." in bare


def test_the_comments_say_what_follows() -> None:
    text = ray_up(request_for(command="tune", resume=True))
    assert "# Start:  ray up FILE\n" in text
    assert "ray dashboard FILE" in text
    assert "# Run:    prefray submit tune RECIPE --resume\n" in text
    assert "initialization_commands" not in text
    assert "mount the storage at /mnt/x themselves" in ray_up(request_for(mount="/mnt/x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provider": "ibm"}, "--provider: unknown: 'ibm'; known: aws, gcp, azure, local"),
        ({"provider": "aws"}, "--provider aws: needs --region, --worker-type as well"),
        ({"provider": "local"}, "--provider local: needs --head-ip as well"),
        (
            {"provider": "gcp", "region": "r", "zone": "z", "worker_type": "w"},
            "--provider gcp: needs --project as well",
        ),
        ({"image": "a b; x"}, "--image: no name of an image: 'a b; x'"),
        ({"name": "Bad Name/.."}, "--name: of a cluster: letters, digits and dashes; got 'Bad Name/..'"),
        ({"image": None}, "--image: which image do aws's machines run"),
        (
            {"provider": "gcp", "region": "r", "zone": "z", "project": "p", "worker_type": "w", **GPU_NODE},
            "--machine-image: what Ray boots on gcp has no driver for GPUs",
        ),
        (
            {**MACHINES["azure"], "machine_image": "a:b"},
            "--machine-image: Azure's have four parts, PUBLISHER:OFFER:SKU:VERSION; got 'a:b'",
        ),
        (
            {"provider": "local", "head_ip": "10.0.0.1", "worker_ip": ("10.0.0.2",), "min_nodes": 3, "max_nodes": 3},
            "--worker-ip: the run needs 3 machines, and with the head there are 2",
        ),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ray_up(request_for(**changes))


def test_what_ray_refuses_is_one_message() -> None:
    config = yaml.safe_load(ray_up(request_for()))
    config["available_node_types"]["worker"]["resources"]["CPU"] = "x"
    with pytest.raises(
        ValueError, match=r"Ray refuses the cluster: available_node_types.worker.resources.CPU: 'x' is not of type"
    ):
        check_cluster(config)
    config = yaml.safe_load(ray_up(request_for()))
    with pytest.raises(ValueError, match="Ray refuses the cluster: .*'head_node_typ' was unexpected"):
        check_cluster({**config, "head_node_typ": "head"})
    with pytest.raises(ValueError, match="Ray refuses the cluster: `head_node_type` must be one of"):
        check_cluster({**config, "head_node_type": "other"})
