"""The cluster's keys."""

from __future__ import annotations

from cluster.config import ClusterKeys


def test_axolotls_names_and_ours_say_the_same() -> None:
    theirs = ClusterKeys.model_validate({"use_ray": True, "ray_num_workers": 4, "resources_per_worker": {"gpu": 1}})
    ours = ClusterKeys.model_validate({"ray": {"num_workers": 4, "resources_per_worker": {"GPU": 1}}})
    assert (theirs.num_workers, theirs.worker_resources()) == (ours.num_workers, ours.worker_resources()) == (4, {"GPU": 1})


def test_nothing_set_is_one_worker() -> None:
    assert (ClusterKeys().num_workers, ClusterKeys().worker_resources()) == (1, None)


def test_the_score_section() -> None:
    keys = ClusterKeys.model_validate({"ray": {"score": {"num_actors": 2, "resources_per_actor": {"gpu": 0.5, "disk": 1}}}})
    assert keys.ray.score.actor_resources() == {"GPU": 0.5, "disk": 1}
    assert ClusterKeys().ray.score.actor_resources() is None
