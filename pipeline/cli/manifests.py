"""Commands that print manifests, which start nodes for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.manifests import MANIFESTS, PROVIDERS, ManifestOptions
from cluster.manifests import Command as ManifestCommand
from pipeline.cli.execution import Debug, Overrides, Recipe, execute

__all__ = ["manifest"]

manifest = typer.Typer(
    help="Print a manifest that starts nodes for a recipe: for KubeRay, `ray up` or Slurm.", no_args_is_help=True
)

Command = Annotated[ManifestCommand, typer.Option("--command", help="What the nodes run.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the job or cluster; COMMAND-RECIPE when not set.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run or sweep in output_dir.")]
Image = Annotated[str | None, typer.Option("--image", help="Image of the nodes, built with the Dockerfile.")]
Mount = Annotated[str | None, typer.Option("--mount", metavar="DIR", help="Path of the nodes' shared storage.")]
PerNode = Annotated[int, typer.Option("--workers-per-node", min=1, help="Training workers on one node.")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Initial nodes; as many as the recipe needs when not set.")]
MaxNodes = Annotated[int | None, typer.Option("--max-nodes", min=1, help="Most nodes; above --nodes, the cluster autoscales.")]
Cpus = Annotated[int | None, typer.Option("--cpus", min=1, help="CPUs of a node; enough for its workers when not set.")]
Memory = Annotated[int | None, typer.Option("--memory", metavar="GIB", min=1, help="Memory of a node.")]
WithGpu = Annotated[
    bool | None,
    typer.Option("--gpu/--no-gpu", help="Whether workers have a GPU, if the recipe doesn't set it."),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write the manifest to a file instead of printing it.")
]


@manifest.command()
def kuberay(
    recipe: Recipe,
    overrides: Overrides = None,
    image: Image = None,
    claim: Annotated[str | None, typer.Option("--claim", help="PersistentVolumeClaim that all nodes mount.")] = None,
    mount: Mount = None,
    secret: Annotated[
        str | None, typer.Option("--secret", help="Secret whose keys become environment variables of the nodes.")
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="Namespace; kubectl's default when not set.")] = None,
    command: Command = "train",
    name: Name = None,
    resume: Resume = False,
    workers_per_node: PerNode = 1,
    nodes: Nodes = None,
    max_nodes: MaxNodes = None,
    cpus: Cpus = None,
    memory: Memory = None,
    gpu: WithGpu = None,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print a RayJob for KubeRay with the recipe: `kubectl apply -f` starts a cluster, runs the recipe, and ends it."""
    # First statement: `locals()` holds exactly the parameters, by the names of `ManifestOptions`.
    _write("kuberay", **locals())


@manifest.command()
def cluster(
    recipe: Recipe,
    overrides: Overrides = None,
    provider: Annotated[str, typer.Option("--provider", help=f"Provider of the machines: {', '.join(PROVIDERS)}.")] = "aws",
    image: Image = None,
    mount: Mount = None,
    region: Annotated[str | None, typer.Option("--region", help="Region of the cloud (on Azure the location).")] = None,
    zone: Annotated[str | None, typer.Option("--zone", help="Zone of the cloud.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="GCP's project id.")] = None,
    resource_group: Annotated[str | None, typer.Option("--resource-group", help="Azure's resource group.")] = None,
    head_type: Annotated[str | None, typer.Option("--head-type", help="Instance type of the head.")] = None,
    worker_type: Annotated[str | None, typer.Option("--worker-type", help="Instance type of the workers.")] = None,
    machine_image: Annotated[str | None, typer.Option("--machine-image", help="Image that the machines boot.")] = None,
    head_ip: Annotated[str | None, typer.Option("--head-ip", help="local: address of the head.")] = None,
    worker_ip: Annotated[list[str] | None, typer.Option("--worker-ip", help="local: address of a worker.")] = None,
    ssh_user: Annotated[str, typer.Option("--ssh-user", help="User that logs in to the machines.")] = "ubuntu",
    ssh_key: Annotated[str | None, typer.Option("--ssh-key", metavar="FILE", help="Private key of the login.")] = None,
    command: Command = "train",
    name: Name = None,
    resume: Resume = False,
    workers_per_node: PerNode = 1,
    nodes: Nodes = None,
    max_nodes: MaxNodes = None,
    cpus: Cpus = None,
    memory: Memory = None,
    gpu: WithGpu = None,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print a cluster config for `ray up`: cloud or local machines, to which runs are then submitted."""
    _write("cluster", **locals())


@manifest.command()
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    time: Annotated[str, typer.Option("--time", help="Time limit of the job; 20 minutes at least.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Slurm's account.")] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option("--setup", metavar="LINE", help="A shell line that activates the environment of `python` and `ray`."),
    ] = None,
    command: Command = "train",
    name: Name = None,
    resume: Resume = False,
    workers_per_node: PerNode = 1,
    nodes: Nodes = None,
    max_nodes: MaxNodes = None,
    cpus: Cpus = None,
    memory: Memory = None,
    gpu: WithGpu = None,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print a script for `sbatch` with the recipe: it saves before the time limit, requeues itself, and resumes."""
    _write("slurm", **locals())


def _write(target: str, output: Path | None, debug: bool, **given: Any) -> None:
    def command(_: Any) -> None:
        from pipeline.config import load_config
        from pipeline.errors import UserError
        from pipeline.jobs.manifest import request_of

        options = ManifestOptions(target, **given)
        text = MANIFESTS[target](request_of(load_config(options.recipe, options.overrides or ()), options))
        if output is None:
            print(text, end="")
            return
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output: {str(output)!r} can't be written: {error.strerror}") from error

    execute(command, quiet=True, debug=debug)
