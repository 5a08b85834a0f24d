"""`setwise cluster VERB`: what the Ray cluster has, and whether a hardware preset is among it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from setwise.pipelines.terminal import JsonOption, emit, results
from setwise.platform.errors import UnreachableError

if TYPE_CHECKING:
    from setwise.pipelines.hardware import Preset
    from setwise.platform.cluster import Node

app = typer.Typer(help="The Ray cluster at RAY_ADDRESS, or this machine as one.", no_args_is_help=True)


@app.command("ls")
def cluster_list(as_json: JsonOption = False) -> None:
    """The machines of the cluster: processors, GPUs and of which kind, memory."""
    from rich.table import Table

    from setwise.platform import cluster

    with cluster.connect():
        found = cluster.nodes()
    if as_json:
        emit({"nodes": [asdict(node) for node in found]})
        return
    table = Table("node", "CPUs", "GPUs", "accelerator", "memory, GiB")
    for node in found:
        numbers = f"{node.cpus:g}", f"{node.gpus:g}", node.accelerator or "", f"{node.memory_gib:.0f}"
        table.add_row(node.address, *numbers)
    results.print(table)


@app.command("check")
def cluster_check(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="hardware, such as rtx3090x1 or h200x1, or a file")],
    as_json: JsonOption = False,
) -> None:
    """Whether the cluster has what a preset speaks of; exit code 6 if not."""
    from setwise.pipelines import hardware
    from setwise.platform import cluster

    asked = hardware.load(preset)[0]
    with cluster.connect():
        found = cluster.nodes()
    has, said = judge(asked, found)
    if as_json:
        emit({"preset": preset, "has": has, "said": said, "nodes": [asdict(node) for node in found]})
    else:
        results.print(f"{preset}: {said}", soft_wrap=True)
    if not has:
        raise UnreachableError(f"the cluster has no {preset}")


def judge(preset: Preset, nodes: Sequence[Node]) -> tuple[bool, str]:
    """Whether machines have what a preset speaks of, and what was counted."""
    asked = f"{preset.count} x {preset.device}"
    if not preset.accelerators:
        cpus = sum(node.cpus for node in nodes)
        return cpus >= preset.count, f"asks for {asked}; the cluster has {cpus:g} CPUs"
    fitting = [node for node in nodes if node.accelerator in preset.accelerators]
    gpus = sum(node.gpus for node in fitting)
    most = max((node.gpus for node in fitting), default=0)
    said = f"asks for {asked}; the cluster has {gpus:g} on {len(fitting)} of {len(nodes)} nodes"
    if gpus >= preset.count > most:
        said += f", at most {most:g} together: the gradients of one training would go over the network"
    others = sorted(
        {f"{node.gpus:g} x {node.accelerator or 'no label'}" for node in nodes if node.gpus} if not gpus else ()
    )
    if others:
        wanted = " or ".join(preset.accelerators)
        said += f" with the label {wanted}. It has GPUs of another label: {', '.join(others)}. Where that is "
        said += f"the same card, say so: ray start --labels=ray.io/accelerator-type={preset.accelerators[0]}"
    return gpus >= preset.count, said
