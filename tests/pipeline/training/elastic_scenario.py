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
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from pipeline import load_config, train
from pipeline.display import SilentDisplay
from pipeline.training import following
from pipeline.training.folder import RunFolder
from tests.pipeline.training.elastic_gates import FOLDER, LOST, RESIZED
from tests.waiting import wait_for


class Recorder(SilentDisplay):
    """Prints what a person would see, and tells of each restart."""

    def __init__(self, restarted: threading.Semaphore) -> None:
        self.restarted = restarted

    def note(self, text: str) -> None:
        print(json.dumps(text), flush=True)
        if text.startswith("continuing"):
            self.restarted.release()


def main(quiet: str, elastic: str) -> None:
    following.RESIZE_INTERVAL_S = 5.0
    gates = Path(tempfile.mkdtemp())
    os.environ[FOLDER] = str(gates)  # before the nodes, whose workers see it
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    train(load_config(quiet, overrides=[f"ray.address={cluster.address}"]), display=SilentDisplay())

    cfg = load_config(elastic, overrides=[f"ray.address={cluster.address}"])
    folder, restarted = RunFolder(Path(cfg.output_dir)), threading.Semaphore(0)

    failed: list[BaseException] = []

    def run() -> None:
        try:
            train(cfg, display=Recorder(restarted))
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    trained = threading.Thread(target=run)
    trained.start()
    wait_for(lambda: folder.checkpoints() and (gates / f"{LOST}.awaited").exists())
    cluster.remove_node(second, allow_graceful=False)
    (gates / LOST).touch()
    restarted.acquire()
    cluster.add_node(num_cpus=1)
    restarted.acquire()
    (gates / RESIZED).touch()
    trained.join()
    ray.shutdown()
    cluster.shutdown()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
