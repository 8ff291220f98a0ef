"""Commands that print what starts nodes for a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.manifests.providers import PROVIDERS
from cluster.manifests.request import Kubernetes, Machines, Slurm
from pipeline.cli.running import Debug, Overrides, Recipe, execute

if TYPE_CHECKING:
    from pipeline.jobs.manifest import ManifestOptions

__all__ = ["manifest"]

manifest = typer.Typer(help="Print what starts nodes for a recipe: for KubeRay, `ray up` or Slurm.", no_args_is_help=True)

Command = Annotated[Literal["train", "tune"], typer.Option("--command", help="What the nodes run.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the job or cluster; COMMAND-RECIPE when not set.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run or sweep that output_dir holds.")]
Image = Annotated[str | None, typer.Option("--image", help="Image of the nodes, built with the Dockerfile.")]
Mount = Annotated[str | None, typer.Option("--mount", metavar="DIR", help="Where the nodes' shared storage lies.")]
PerNode = Annotated[int, typer.Option("--workers-per-node", min=1, help="Training workers on one node.")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes to begin with; as the recipe needs when not set.")]
MaxNodes = Annotated[int | None, typer.Option("--max-nodes", min=1, help="More than --nodes: the number follows the work.")]
Cpus = Annotated[int | None, typer.Option("--cpus", min=1, help="CPUs of a node; enough for its workers when not set.")]
Memory = Annotated[int | None, typer.Option("--memory", metavar="GIB", min=1, help="Memory of a node.")]
WithGpu = Annotated[
    bool | None,
    typer.Option("--gpu/--no-gpu", help="Whether workers have a GPU, where the recipe doesn't say."),
]
Output = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write it there, instead of printing it.")]


@manifest.command()
def kuberay(
    recipe: Recipe,
    overrides: Overrides = None,
    image: Image = None,
    claim: Annotated[str | None, typer.Option("--claim", help="PersistentVolumeClaim that all nodes mount.")] = None,
    mount: Mount = None,
    secret: Annotated[str | None, typer.Option("--secret", help="Secret whose keys become variables of the nodes.")] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="Namespace; kubectl's own when not set.")] = None,
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
    """A RayJob for KubeRay, with the recipe in it: `kubectl apply -f` starts a cluster, runs the recipe, and ends it."""
    sizes = _sizes(command, name, resume, workers_per_node, nodes, max_nodes, cpus, memory, gpu)
    given = {**sizes, "image": image, "mount": mount, "kubernetes": Kubernetes(namespace, claim, secret)}
    _write("kuberay", recipe, overrides, given, output, debug)


@manifest.command()
def cluster(
    recipe: Recipe,
    overrides: Overrides = None,
    provider: Annotated[str, typer.Option("--provider", help=f"Whose machines: {', '.join(PROVIDERS)}.")] = "aws",
    image: Image = None,
    mount: Mount = None,
    region: Annotated[str | None, typer.Option("--region", help="Region of the cloud (of Azure the location).")] = None,
    zone: Annotated[str | None, typer.Option("--zone", help="Zone of the cloud.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="GCP's project id.")] = None,
    resource_group: Annotated[str | None, typer.Option("--resource-group", help="Azure's resource group.")] = None,
    head_type: Annotated[str | None, typer.Option("--head-type", help="Instance type of the head.")] = None,
    worker_type: Annotated[str | None, typer.Option("--worker-type", help="Instance type of the workers.")] = None,
    machine_image: Annotated[str | None, typer.Option("--machine-image", help="What the machines boot.")] = None,
    head_ip: Annotated[str | None, typer.Option("--head-ip", help="local: address of the head.")] = None,
    worker_ip: Annotated[list[str] | None, typer.Option("--worker-ip", help="local: address of a worker.")] = None,
    ssh_user: Annotated[str, typer.Option("--ssh-user", help="Who logs in to the machines.")] = "ubuntu",
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
    """A cluster for `ray up`: machines of a cloud or one's own, that runs are then submitted to."""
    machines = Machines(
        provider=provider,
        region=region,
        zone=zone,
        project=project,
        resource_group=resource_group,
        head_type=head_type,
        worker_type=worker_type,
        machine_image=machine_image,
        head_ip=head_ip,
        worker_ips=tuple(worker_ip or ()),
        ssh_user=ssh_user,
        ssh_private_key=ssh_key,
    )
    sizes = _sizes(command, name, resume, workers_per_node, nodes, max_nodes, cpus, memory, gpu)
    _write("cluster", recipe, overrides, {**sizes, "image": image, "mount": mount, "machines": machines}, output, debug)


@manifest.command()
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    time: Annotated[str, typer.Option("--time", help="Limit of one stay; 20 minutes at least.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Slurm's account.")] = None,
    setup: Annotated[
        list[str] | None, typer.Option("--setup", metavar="LINE", help="A line that makes `python` and `ray` the right ones.")
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
    """A script for `sbatch`, with the recipe in it: it saves before the time limit, and goes on after another wait."""
    sizes = _sizes(command, name, resume, workers_per_node, nodes, max_nodes, cpus, memory, gpu)
    given = {**sizes, "slurm": Slurm(time, partition, account, tuple(setup or ()))}
    _write("slurm", recipe, overrides, given, output, debug)


def _sizes(
    command: str,
    name: str | None,
    resume: bool,
    workers_per_node: int,
    nodes: int | None,
    max_nodes: int | None,
    cpus: int | None,
    memory: int | None,
    gpu: bool | None,
) -> dict[str, Any]:
    """What all manifests are told: the command, and how many nodes of what size."""
    return {
        "command": command,
        "name": name,
        "resume": resume,
        "workers_per_node": workers_per_node,
        "nodes": nodes,
        "max_nodes": max_nodes,
        "cpus": cpus,
        "memory": memory,
        "gpu": gpu,
    }


def _write(
    target: str, recipe: str, overrides: list[str] | None, given: dict[str, Any], output: Path | None, debug: bool
) -> None:
    def command(_: Any) -> None:
        from cluster.manifests import MANIFESTS
        from pipeline.config import load_config
        from pipeline.errors import UserError
        from pipeline.jobs.manifest import ManifestOptions, recipe_with, request_of

        sets = tuple(overrides or ())
        options: ManifestOptions = replace(ManifestOptions(target, recipe, sets), **given)
        text = MANIFESTS[target](request_of(load_config(recipe, sets), recipe_with(recipe, sets), options))
        if output is None:
            print(text, end="")
            return
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output: {str(output)!r} can't be written: {error.strerror}") from error

    execute(command, quiet=True, debug=debug)
