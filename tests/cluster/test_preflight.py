"""Whether a cluster holds the workers is said before anything waits for it."""

from __future__ import annotations

import pytest

from cluster.placement import ActorPlan, WorkerPlan, count_runs, fit_at_once, plan_actors, plan_workers

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


def test_workers_of_nothing() -> None:
    """Ray places no bundle without resources."""
    with pytest.raises(ValueError, match=r"ray.resources_per_worker: 0 CPU is nothing that Ray could place; give a part of a"):
        plan_workers(2, False, {"CPU": 0.0}, [CPU_NODE])
    with pytest.raises(ValueError, match=r"ray.score.resources_per_actor.CPU: must be 0 or more, got -1"):
        plan_actors(None, "auto", {"CPU": -1.0}, [CPU_NODE], most=9)
    assert plan_workers(1, "auto", {"CPU": 0.0}, [GPU_NODE]).resources == {"CPU": 0.0, "GPU": 1.0}


def test_a_worker_does_not_spread_over_nodes() -> None:
    with pytest.raises(ValueError, match=r"the cluster has 4 CPU on 2 nodes, enough for 0"):
        plan_workers(1, False, {"CPU": 3.0}, [CPU_NODE, CPU_NODE])
    assert plan_workers(2, False, {"CPU": 2.0}, [CPU_NODE, CPU_NODE]).num_workers == 2


def test_how_many_runs_fit_at_once() -> None:
    small, large = WorkerPlan(1, False, {"CPU": 1.0}), WorkerPlan(2, False, {"CPU": 2.0})
    assert (count_runs(small, [CPU_NODE, CPU_NODE]), count_runs(large, [CPU_NODE, CPU_NODE])) == (4, 1)
    assert fit_at_once([small, small], [CPU_NODE]) and not fit_at_once([small, large], [CPU_NODE, CPU_NODE])
    assert fit_at_once([WorkerPlan(4, False, {"CPU": 1.0}, min_workers=1), small], [CPU_NODE])
    assert fit_at_once([], [])


def test_one_actor_takes_a_small_node_and_eight_cpus_of_a_large_one() -> None:
    assert plan_actors(None, "auto", None, [CPU_NODE], most=9) == ActorPlan(1, {"CPU": 2.0})
    assert plan_actors(None, "auto", None, [{"CPU": 64.0}, CPU_NODE], most=9) == ActorPlan(8, {"CPU": 8.0})
    assert plan_actors(None, "auto", None, [{"CPU": 64.0}], most=3).num_actors == 3


def test_one_actor_per_gpu() -> None:
    plan = plan_actors(None, "auto", None, [CPU_NODE, GPU_NODE], most=9)
    assert plan == ActorPlan(4, {"GPU": 1.0, "CPU": 1.0})
    assert plan.use_gpu
    assert not plan_actors(None, False, None, [GPU_NODE], most=9).use_gpu
    assert not plan_actors(1, "auto", {"CPU": 2.0}, [GPU_NODE], most=9).use_gpu


def test_actors_that_were_asked_for_must_fit_even_if_fewer_have_work() -> None:
    assert plan_actors(2, "auto", {"CPU": 1.0}, [CPU_NODE], most=1).num_actors == 1
    with pytest.raises(
        ValueError,
        match=r"ray.score.num_actors: 3 actors of 1 CPU each don't fit: the cluster has 2 CPU on 1 node, enough for 2",
    ):
        plan_actors(3, "auto", {"CPU": 1.0}, [CPU_NODE], most=1)
    with pytest.raises(
        ValueError, match=r"ray.score.num_actors: 1 actor of 1 GPU, 1 CPU each .* 0 GPU, 2 CPU on 1 node, enough"
    ):
        plan_actors(None, "auto", {"GPU": 1.0}, [CPU_NODE], most=5)
