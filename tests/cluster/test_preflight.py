"""Whether a cluster holds the workers is said before anything waits for it."""

from __future__ import annotations

import pytest

from cluster.preflight import WorkerPlan, plan_workers

CPU_NODE = {"CPU": 2.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 4.0}


def test_a_cpu_cluster_gives_a_cpu_to_each_worker() -> None:
    assert plan_workers(2, "auto", None, [CPU_NODE]) == WorkerPlan(2, False, {"CPU": 1.0})


def test_a_gpu_cluster_gives_a_gpu_to_each_worker() -> None:
    assert plan_workers(4, "auto", None, [CPU_NODE, GPU_NODE]) == WorkerPlan(4, True, {"GPU": 1.0, "CPU": 1.0})
    assert plan_workers(2, False, None, [GPU_NODE]) == WorkerPlan(2, False, {"CPU": 1.0})


def test_what_the_config_asks_for_wins() -> None:
    assert plan_workers(1, "auto", {"CPU": 4.0}, [GPU_NODE]).resources == {"CPU": 4.0, "GPU": 1.0}


def test_too_many_workers() -> None:
    with pytest.raises(
        ValueError, match=r"ray.num_workers: 3 workers of 1 CPU each don't fit: the cluster has 2 CPU on 1 node, enough for 2"
    ):
        plan_workers(3, "auto", None, [CPU_NODE])


def test_gpus_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"2 workers of 1 GPU, 1 CPU each don't fit: the cluster has 0 GPU, 2 CPU on 1 node"):
        plan_workers(2, True, None, [CPU_NODE])


def test_a_worker_does_not_spread_over_nodes() -> None:
    with pytest.raises(ValueError, match=r"the cluster has 4 CPU on 2 nodes, enough for 0"):
        plan_workers(1, False, {"CPU": 3.0}, [CPU_NODE, CPU_NODE])
    assert plan_workers(2, False, {"CPU": 2.0}, [CPU_NODE, CPU_NODE]).num_workers == 2
