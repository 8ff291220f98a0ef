"""Arguments of a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.io.remote_models import RemoteModels
from pipeline.io.storage import Folder
from pipeline.ray.channel import NodeChannel

if TYPE_CHECKING:
    from pyarrow import fs

    from pipeline.data import Prepared
    from pipeline.inspection.selection import Selection
    from pipeline.reference import Scores

__all__ = ["WorkerJob"]


@dataclass(frozen=True)
class WorkerJob:
    """Arguments of every worker, from the driver."""

    cfg: RunConfig
    """The recipe, its paths made absolute."""
    prepared: Prepared
    """Handle of the rows in the store."""
    total_steps: int
    run: str
    """`RunFolder.run_id`."""
    scratch: str
    """Name of the run's scratch folder on each node."""
    former_scratch: str | None
    """Name of the scratch folder of a former driver that was killed or lost."""
    import_path: str
    """The driver's current directory, from which reward functions may be imported."""
    sharding: dict[str, Any]
    """`cluster.sharding.sharding_arguments` of the config."""
    scores: Scores | None = None
    """Reference log-probabilities of the rows, where they are cached."""
    debug: bool = False
    selection: Selection | None = None
    """Training rows that are kept; None for all."""
    models: RemoteModels = field(default_factory=RemoteModels)
    """Those at URIs, as the driver has found them."""
    storage: Folder | None = None
    """The run's folder, where Ray Train's own folder isn't it: on a host, of which many runs share the workers."""
    channel: NodeChannel | None = None
    """On a host, that of the run's driver, to which its reports are forwarded."""

    def location(self) -> tuple[fs.FileSystem, str]:
        """Return the filesystem and path of the run's folder; in a worker."""
        import ray.train

        if self.storage is not None:
            return self.storage.filesystem, self.storage.path
        storage = ray.train.get_context().get_storage()
        return storage.storage_filesystem, storage.experiment_fs_path
