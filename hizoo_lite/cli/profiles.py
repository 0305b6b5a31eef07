"""`hizoo-lite profiles`: the machines that a run can be planned for and held to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from hizoo_lite.plan import hardware
from hizoo_lite.units import format_bytes


def command(json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False) -> None:
    """List the machines that --profile of `plan`, `train`, `eval` and `generate` takes.

    Settings for a purpose are in `hizoo-lite recipes`.

    Examples:

    hizoo-lite profiles

    hizoo-lite profiles --json
    """
    from hizoo_lite.cli import output

    found = {name: hardware.find(name) for name in hardware.names()}
    if json:
        output.print_json({"profiles": {name: asdict(machine) for name, machine in found.items()}})
        return
    rows = [
        [
            name,
            machine.device,
            format_bytes(machine.device_budget_bytes),
            format_bytes(machine.host_budget_bytes),
            f"{machine.operations[machine.compute] / 1e12:.3g} {machine.compute}",
        ]
        for name, machine in found.items()
    ]
    output.print_table("machines", ["name", "device", "usable", "host", "Tflop/s"], rows)
