"""What can be known of the code for GPUs without one, on a simulated device (tests/simulated).

    python tools/sim_gpu.py [--quick] [--json FILE]

Order: blocks travel between host, disk and device under vector clocks, in ten scenarios; races are accesses
to the same bytes that nothing orders. Then fetchers that each lack one ordering, which must be caught.
Numbers: runs on the simulated GPU beside runs on a CPU (the largest difference of a loss), one that is
interrupted and resumed, one under the least budget that the planner allows. Shapes: what a block of
Llama-2-7B launches and moves (all but products and unpacking) in a pass of three branches with LoRA on q and
v, and how often the host waits for the device in a pass. --quick: four scenarios, three variants, two runs.

JSON: {"scenarios", "races", "variants", "variants_caught", "max_abs_difference", "launches_per_block",
"bytes_per_token_block", "syncs_per_pass", "resume_equal", "cap_held"}. Exit code 1 where there is a race, a
variant is missed, or a run does not end as it should.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from reporting import make_parser, publish

from tests.simulated import figures, shapes, streams
from tests.simulated.gpu import installed
from tests.test_stream import checkpoint, step_losses

#: The scenarios in which a variant is looked for, those first that catch most.
_CATCHING = (("disk", "updates"), ("host", "updates"), ("disk", "passes"))


def order(folder: Path, quick: bool) -> dict[str, Any]:
    """Races of the fetcher, and which variants of it are caught."""
    from hizoo_lite.engine.load import load

    packed = checkpoint("llama", "nf4", folder, num_hidden_layers=6)

    def opened(residency: str) -> Any:
        return load(packed, compute_dtype="float32", device="simgpu", residency=residency)  # type: ignore[arg-type]

    with installed():
        wanted = step_losses(opened("resident"), "llama")
    scenarios = streams.SCENARIOS[::3] if quick else streams.SCENARIOS
    variants = list(streams.VARIANTS)[::3] if quick else list(streams.VARIANTS)
    found = {
        scenario: streams.races(opened, *scenario, folder / "-".join(scenario), wanted)
        for scenario in scenarios
    }
    caught = [
        name
        for name in variants
        if any(
            streams.races(opened, *scenario, folder / name / scenario[0], wanted, streams.variant(name))
            for scenario in _CATCHING
        )
    ]
    for races in found.values():
        for race in sorted(set(races)):
            print(race, file=sys.stderr)
    return {
        "scenarios": len(found),
        "races": sum(map(len, found.values())),
        "variants": len(variants),
        "variants_caught": len(caught),
    }


def numbers(folder: Path, quick: bool) -> dict[str, Any]:
    """Runs beside those of a CPU, interrupted, and under a budget."""
    model = figures.packed(folder / "nf4")
    runs = figures.RUNS[::4] if quick else figures.RUNS
    differences = []
    for number, (space, residency) in enumerate(runs):
        (folder / str(number)).mkdir()
        differences.append(figures.difference(model, folder / str(number), space, residency))
    for name in ("resume", "cap"):
        (folder / name).mkdir()
    return {
        "max_abs_difference": max(differences),
        "resume_equal": figures.resumes(model, folder / "resume"),
        "cap_held": figures.keeps_to_cap(model, folder / "cap"),
    }


def main() -> None:
    """Measure, print, and judge."""
    arguments = make_parser(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("order", "numbers"):
            (folder / name).mkdir()
        # first: a variant that fails may leave tensors behind, which count under a budget
        counted = numbers(folder / "numbers", arguments.quick)
        found = {
            **order(folder / "order", arguments.quick),
            **counted,
            **shapes.count()._asdict(),
        }
    publish("Simulated GPU", ["figure", "value"], [[k, v] for k, v in found.items()], found, arguments)
    right = found["races"] == 0 and found["variants_caught"] == found["variants"]
    sys.exit(0 if right and found["resume_equal"] and found["cap_held"] else 1)


if __name__ == "__main__":
    main()
