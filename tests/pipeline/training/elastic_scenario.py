"""A run on three Ray nodes on this machine, once quietly and once with a node that is lost and later replaced.

Run as a script, for it needs a Ray of its own: `python -m tests.pipeline.training.elastic_scenario QUIET ELASTIC`, two recipes
of which the second has the plugin `elastic_gates`. Prints a line of JSON per note of the second. Ray notices a lost node, and
the run a new one, sooner than by default.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from pipeline import load_config, train
from pipeline.ray.session import local_options, set_intervals
from pipeline.runs.folder import RunFolder
from pipeline.training import launch as following
from pipeline.ui.display import SilentDisplay
from tests.pipeline.training.elastic_gates import FOLDER, LOST, RESIZED
from tests.waiting import wait_for


class Recorder(SilentDisplay):
    """Prints what a person would see, and tells of each restart."""

    def __init__(self) -> None:
        self.restarts = 0

    def note(self, text: str) -> None:
        print(json.dumps(text), flush=True)
        if text.startswith("continuing"):
            self.restarts += 1


def main(quiet: str, elastic: str) -> None:
    following.RESIZE_INTERVAL_S = 5.0
    gates = Path(tempfile.mkdtemp())
    os.environ[FOLDER] = str(gates)  # before the nodes, whose workers see it
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    )
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    cfg = load_config(elastic)
    set_intervals(cfg)
    # All nodes are on this machine, so workers can start as fast as those of a Ray on one.
    ray.init(cluster.address, runtime_env=local_options()["runtime_env"], log_to_driver=False)
    train(load_config(quiet), display=SilentDisplay())

    wait_for(lambda: ray.available_resources().get("CPU") == 2)  # else the next run starts with one worker
    folder, recorder = RunFolder(Path(cfg.output_dir)), Recorder()

    failed: list[BaseException] = []

    def run() -> None:
        try:
            train(cfg, display=recorder)
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    trained = threading.Thread(target=run, daemon=True)
    trained.start()

    def until(condition: Callable[[], object]) -> None:
        wait_for(lambda: condition() or not trained.is_alive())

    def waits(gate: str, ranks: int) -> bool:
        return all((gates / f"{gate}.awaited.{rank}").exists() for rank in range(ranks))

    until(lambda: len(folder.checkpoints()) == 1 and waits(LOST, ranks=2))
    cluster.remove_node(second, allow_graceful=False)
    until(lambda: recorder.restarts == 1)
    (gates / LOST).touch()
    until(lambda: len(folder.checkpoints()) == 2 and waits(RESIZED, ranks=1))
    cluster.add_node(num_cpus=1)
    until(lambda: recorder.restarts == 2)
    (gates / RESIZED).touch()
    trained.join()
    ray.shutdown()
    cluster.shutdown()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
