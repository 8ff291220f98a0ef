"""What follows from what nodes tell. Real nodes: tests/pipeline/jobs/test_on_a_cluster.py."""

from __future__ import annotations

import pytest

from cluster.config import RayConfig
from pipeline.config import parse_config
from pipeline.doctor.checks import Check
from pipeline.doctor.cluster import check_checkpoint, check_nodes, check_resources, quick_checks
from pipeline.doctor.machine import Gpu, Gpus
from pipeline.doctor.node import CACHE, TEMPORARY, ProbeRequest, Resource
from pipeline.doctor.nodes import ProbeReport, names_of
from tests.pipeline.doctor.facts import GIB, answers_of, node

A, B = "10.0.0.1", "10.0.0.2"


def quick(answers: ProbeReport) -> dict[str, Check]:
    return {check.name: check for check in quick_checks(answers, ["output_dir"])}


def full(answers: ProbeReport, things: tuple[Resource, ...] = (), stores: dict[str, float] | None = None) -> dict[str, Check]:
    return {check.name: check for check in check_nodes(answers, ProbeRequest("run", {}, things), stores or {})}


def test_nodes_that_are_right() -> None:
    found = quick(answers_of(node(A), node(B)))
    assert {check.status for check in found.values()} == {"pass"}
    assert found["versions"].finding == "Python 3.11.7, ray 1.0, torch 1.0, prefray's code abc, and 8 more, on 2 nodes"
    assert found["output_dir"].finding == "written and seen by 2 nodes"
    assert found["gloo interface"].finding == f"eth0 on {A}, eth0 on {B}"


def test_a_node_that_does_not_answer() -> None:
    found = quick(answers_of(node(A), silent={B: "no answer within 90 s"}))
    assert found[f"node {B}"] == Check(f"node {B}", "fail", "doesn't answer: no answer within 90 s")
    assert "gloo interface" not in found


def test_versions_that_differ() -> None:
    other = {**node(B).versions, "torch": "2.0", "deepspeed": None}
    found = quick(answers_of(node(A), node(B, versions=other, python="3.11.8", code="xyz")))
    assert found["version of torch"].status == "fail"
    assert found["version of torch"].finding.startswith(f"1.0 on {A}, 2.0 on {B}; build all nodes from one image")
    assert f"none on {B}" in found["version of deepspeed"].finding
    assert {"version of Python", "version of prefray's code"} <= found.keys()
    assert "version of ray" not in found
    missing = {**node(A).versions, "trl": None}
    assert quick(answers_of(node(A, versions=missing)))["version of trl"].finding.startswith("isn't installed here")


def test_plugins_that_a_node_lacks() -> None:
    found = quick(answers_of(node(A), node(B, plugins="plugins.0: can't import my_loss")))
    assert found["plugins"].status == "fail"
    assert found["plugins"].finding.startswith(f"plugins.0: can't import my_loss (on {B}); submit from their folder")


def test_storage_that_is_not_shared() -> None:
    found = quick(answers_of(node(A), node(B), blind={A: [A], B: [B]}))
    assert found["output_dir"].status == "fail"
    assert f"{A} doesn't see what {B} wrote; {B} doesn't see what {A} wrote" in found["output_dir"].finding
    assert "s3://bucket/run" in found["output_dir"].finding


def test_storage_that_can_not_be_written() -> None:
    found = quick(answers_of(node(A), node(B, unwritable={"output_dir": "Permission denied"})))
    assert found["output_dir"] == Check("output_dir", "fail", f"can't be written: Permission denied (on {B})")


def test_the_cache_of_each_node() -> None:
    keys = ProbeRequest("run", ray=RayConfig(cache_dir="/fast"))
    free = {CACHE: 7 * GIB, TEMPORARY: 50 * GIB}
    fine = {check.name: check for check in check_nodes(answers_of(node(A, disks=free)), keys, {})}
    assert fine["node cache"] == Check("node cache", "pass", f"at least 7.0 GiB free for rows and models (on {A})")
    bad = answers_of(node(A, disks=free), node(B, disks=free, unwritable={CACHE: "Read-only file system"}))
    found = {check.name: check for check in check_nodes(bad, keys, {})}["node cache"]
    assert found.status == "fail" and found == quick(bad)["node cache"]
    assert found.finding == f"can't be written: Read-only file system (on {B}); set ray.cache_dir, or PREFRAY_CACHE there"


def test_models_and_data_that_can_not_be_reached() -> None:
    things = (Resource("base_model", "org/m", "model"), Resource("datasets.0", "x.jsonl", "data"))
    found = full(answers_of(node(A), node(B, unreachable={"datasets.0": "no such file"})), things)
    assert found["base_model"] == Check("base_model", "pass", "org/m can be reached from 2 nodes")
    assert found["datasets.0"].finding == f"'x.jsonl' can't be reached: no such file (on {B})"


def test_disks_and_shared_memory() -> None:
    found = full(answers_of(node(A), node(B, disks={"Ray's files": GIB})), stores={A: 4.0 * GIB, B: 9.0 * GIB})
    assert found["disk"].status == "warn" and found["disk"].finding.startswith(f"at least 1.0 GiB free (Ray's files on {B})")
    assert found["shared memory"].status == "warn"
    assert f"{B} has 8.0 GiB for an object store of 9.0 GiB" in found["shared memory"].finding
    assert "--shm-size" in found["shared memory"].finding and A not in found["shared memory"].finding
    fine = full(answers_of(node(A)))
    assert (fine["disk"].status, fine["shared memory"].status) == ("pass", "pass")


def test_a_checkpoint_has_room_on_every_node() -> None:
    small = node(B, disks={TEMPORARY: 3 * GIB})
    assert check_checkpoint(2 * GIB, [node(A), small]).status == "pass"
    found = check_checkpoint(4 * GIB, [node(A), small])
    assert found.status == "fail" and "up to 4.0 GiB" in found.finding
    assert f"{B} has 3.0 GiB free: set TMPDIR" in found.finding and A not in found.finding


def test_gpus() -> None:
    h100, a10 = Gpu("H100", 80 * GIB, 79 * GIB), Gpu("A10", 24 * GIB, 20 * GIB)
    two, one = Gpus((h100, h100), None, "13.0", "2.28.9"), Gpus((h100,), None, "13.0", "2.28.9")
    found = full(answers_of(node(A, gpus=two), node(B, gpus=one)))
    assert found["GPUs"].status == "pass"
    assert found["GPUs"].finding == f"{A}: 2 x H100 with 80.0 GiB, 79.0 GiB free; {B}: 1 x H100 with 80.0 GiB, 79.0 GiB free"
    assert found["NCCL"] == Check("NCCL", "pass", "CUDA 13.0, NCCL 2.28.9")
    mixed = full(answers_of(node(A, gpus=one), node(B, gpus=Gpus((a10,), None, "12.8"))))
    assert mixed["GPUs"].status == "warn" and "the slowest one sets the pace" in mixed["GPUs"].finding
    assert mixed["NCCL"].status == "fail" and "NCCL none" in mixed["NCCL"].finding
    blind = full(answers_of(node(A, gpus=Gpus(problem="torch was built without CUDA"))))
    assert (
        blind["GPUs"].status == "fail" and f"Ray counts GPUs on {A}, and torch was built without CUDA" in blind["GPUs"].finding
    )


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"interfaces": {"lo": ("127.0.0.1",), "ens5": (B,), "docker0": ("172.17.0.1",)}}, "pass", f"eth0 on {A}, ens5 on {B}"),
        ({"gloo_interface": "docker0", "interfaces": {"docker0": ("172.17.0.1",)}}, "pass", f"docker0 on {B}"),
        ({"gloo_interface": "eth7"}, "fail", "GLOO_SOCKET_IFNAME=eth7 names none of its interfaces (lo, eth0); set it right"),
        ({"interfaces": {"lo": ("127.0.0.1",)}}, "fail", "none of its interfaces has the address that the cluster knows"),
        ({"address": "fd00::2", "interfaces": {"eth0": ("10.0.0.9", "fd00::2")}}, "pass", f"eth0 on {B}"),
        ({"address": "node-b"}, "fail", "the cluster knows it as 'node-b'; start Ray there with --node-ip-address"),
        (
            {"address": "127.0.0.1"},
            "fail",
            "the cluster knows it by its loopback address; start Ray there with",
        ),
    ],
)
def test_the_interface_of_gloo(changes: dict[str, object], status: str, words: str) -> None:
    found = quick(answers_of(node(A), node(B, **changes)))["gloo interface"]
    assert found.status == status and words in found.finding


def test_nodes_of_one_machine_need_no_interface() -> None:
    assert "gloo interface" not in quick(answers_of(node("127.0.0.1:aaaaaa"), node("127.0.0.1:bbbbbb")))
    assert "gloo interface" not in quick(answers_of(node(A)))


def test_what_a_recipe_asks_for() -> None:
    cfg = parse_config({"base_model": "m", "datasets": [{"path": "x"}], "ray": {"num_workers": 2}})
    fits = {check.name: check for check in check_resources(cfg, [{"CPU": 1.0}, {"CPU": 1.0}], has_autoscaler=False)}
    assert fits["training workers"].finding == "2 workers of 1 CPU: they fit"
    assert fits["scoring actors"].finding == "up to 2 of 1 CPU"
    (lacking, _) = check_resources(cfg, [{"CPU": 1.0}], has_autoscaler=False)
    assert lacking.status == "fail" and "2 workers of 1 CPU each don't fit" in lacking.finding
    (later, _) = check_resources(cfg, [{"CPU": 1.0}], has_autoscaler=True)
    assert later.status == "warn" and later.finding.endswith("(the cluster scales: nodes may come)")
    without = parse_config({"base_model": "m", "rl": "orpo", "datasets": [{"path": "x"}]})
    assert [check.name for check in check_resources(without, [{"CPU": 1.0}], has_autoscaler=False)] == ["training workers"]


def test_nodes_of_one_machine_have_names_of_their_own() -> None:
    nodes = [{"NodeID": "aaaaaaaa", "NodeManagerAddress": A}, {"NodeID": "bbbbbbbb", "NodeManagerAddress": A}]
    assert names_of(nodes) == {"aaaaaaaa": f"{A}:aaaaaa", "bbbbbbbb": f"{A}:bbbbbb"}
    nodes[1]["NodeManagerAddress"] = B
    assert names_of(nodes) == {"aaaaaaaa": A, "bbbbbbbb": B}
