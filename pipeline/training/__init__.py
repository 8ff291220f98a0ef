"""Stage 3: Ray Train runs the trainer on every worker. A run's files are those of `pipeline/runs/`.

driver.py               the run as a whole: prepares, decides and checks before workers start; plan.py its decisions
launch.py               starts the workers, handles their events; torch_backend.py configures Ray Train, announces workers
worker.py               trains on each worker; job.py its arguments
worker_callbacks.py     reports from the trainer's callbacks to Ray's controller; worker_checkpoints.py stores checkpoints
controller_callback.py  forwards reports from the controller to the driver; run_log.py writes and shows them
host.py                 gives runs slots of hosts, whose workers train many runs on one base; slot_launch.py a run's side
one_host.py             a host: its start, failures and end; host_worker.py its worker; hosted_run.py a run of it;
                        host_failures.py whom a failure concerns
slot_commands.py        commands of a host's driver to its worker; turn_note.py whose turn it was when workers died
together/               several runs in one command
sharing.py              which runs can share a base
heartbeat.py            a worker's last heartbeat; hang_detection.py finds workers without one
signals.py              SIGTERM; row_ledger.py the rows of each step
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.training.controller_callback import ForwardEvents
    from pipeline.training.host_worker import HostJob, run_host
    from pipeline.training.torch_backend import ClusterTorchConfig, ClusterTorchTrainer
    from pipeline.training.worker import run_worker
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "pipeline.training.controller_callback": "ForwardEvents",
            "pipeline.training.host_worker": "HostJob run_host",
            "pipeline.training.torch_backend": "ClusterTorchConfig ClusterTorchTrainer",
            "pipeline.training.worker": "run_worker",
        },
    )

__all__ = ["ClusterTorchConfig", "ClusterTorchTrainer", "ForwardEvents", "HostJob", "run_host", "run_worker"]
