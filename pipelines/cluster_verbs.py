"""`setwise cluster VERB`: what the Ray cluster has, and whether a hardware preset is among it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from setwise.pipelines.terminal import JsonOption, emit, results
from setwise.platform.errors import UnreachableError

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
        has, said = hardware.judge(asked, found, cluster.capacity(asked.accelerators))
    if as_json:
        emit({"preset": preset, "has": has, "said": said, "nodes": [asdict(node) for node in found]})
    else:
        results.print(f"{preset}: {said}", soft_wrap=True)
    if not has:
        raise UnreachableError(f"the cluster has no {preset}")
