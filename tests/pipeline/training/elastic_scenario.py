"""An elastic run on a cluster of three Ray nodes on this machine, of which one is lost and later replaced.

Run as a script, for it needs a Ray of its own: `python -m tests.pipeline.training.elastic_scenario RECIPE`. Prints a line
of JSON per event, with the time it came. Ray notices a lost node, and the run a new one, sooner than by default.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from pipeline import load_config, train
from pipeline.display import SilentDisplay
from pipeline.training import following
from pipeline.training.folder import RunFolder
from pipeline.training.metrics import MetricsFile

WAIT_S = 400
LOST_AFTER, BACK_AFTER = 20, 60
"""Steps after which the node goes and comes back."""


def say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, "time": time.time(), **facts}), flush=True)


class Teller(SilentDisplay):
    """Prints what a person would see."""

    def note(self, text: str) -> None:
        say("note", text=text)


def wait_for_step(folder: RunFolder, step: int, run: threading.Thread) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and run.is_alive():
        records = MetricsFile(folder.metrics).read() if folder.metrics.exists() else []
        if folder.checkpoints() and any(record["step"] >= step for record in records):
            return
        time.sleep(0.1)
    say("given up", step=step)


def main(recipe: str) -> None:
    following.RESIZE_INTERVAL_S = 5.0
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    cfg = load_config(recipe, overrides=[f"ray.address={cluster.address}"])
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result = train(cfg, display=Teller())
            say("finished", steps=result.steps)
        except BaseException as error:  # noqa: BLE001 - said, and the script fails
            failed.append(error)
            say("failed", error=str(error))

    folder = RunFolder(Path(cfg.output_dir))
    thread = threading.Thread(target=run)
    thread.start()
    wait_for_step(folder, LOST_AFTER, thread)
    cluster.remove_node(second, allow_graceful=False)
    say("lost")
    wait_for_step(folder, BACK_AFTER, thread)
    cluster.add_node(num_cpus=1)
    say("back")
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    main(sys.argv[1])
