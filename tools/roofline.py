"""What a step of Llama 2 takes on a GPU, and what it would take at least, from counts and a profile's rates.

    python tools/roofline.py
    python tools/roofline.py --profile h200-141gb --json roofline.json
    python tools/roofline.py --quick

NF4 with double quantization, bf16 products, LoRA of rank 8 on q and v of every block, three branches, rows
without padding. Operations, bytes and launches are counted on the traversal itself, which passes over tensors
of the models' shapes on a simulated GPU (tests/simulated/costs.py); nothing is measured, so this is no
benchmark of a GPU. A step is taken to last as long as its GPU, its host or its PCIe, whichever takes longest:
the host launches ahead and blocks travel beside the computation, but for the matrix of the head. Noise, which
is drawn beside the GPU, and the update are left out.

Limit: the same products, attention and adapters; every weight unpacked once; one kernel before and one after
the product of a linear layer, operands of one input shared; one kernel for each norm, for rotary codes, for
the gate and for each sum with the residual; blocks and head over PCIe beside that; launches hidden. Rates are
the profile's, times the shares below. --quick: the first row alone.

JSON: {"rows": [{"model", "batch", "device", "step_ms", "limit_ms"}]}.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from reporting import make_parser, publish

from hizoo_lite.plan.hardware import Hardware, find
from tests.simulated import costs

#: Shares of a profile's published rates. Estimates for one RTX 4090, not measurements: large bf16 products
#: reach 140 of 165 TFLOP/s, streaming kernels 907 of 1008 GB/s, bitsandbytes' decoder, which loads byte by
#: byte, 756 GB/s (assumed).
PRODUCTS, BANDWIDTH, UNPACKING = 0.85, 0.90, 0.75
#: Memory-efficient attention in float32 multiplies with three TF32 products (27 TFLOP/s, where a 4090 has
#: 82.6 in float32) and reaches half of that.
ATTENTION = 27.0 / 82.6 / 2
#: Seconds of the host for a launch from Python.
LAUNCH = 8e-6

MODELS = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
}


class Case(NamedTuple):
    """A row of the table."""

    model: str
    rows: int
    length: int
    travelling: int = 0  # blocks that are not on the device


#: Of 70B 42 of 80 blocks are taken to stay; a plan for 24 GB without other programs keeps some more.
CASES = (
    Case("llama-2-7b", 16, 64),
    Case("llama-2-7b", 2, 32),
    Case("llama-2-7b", 1, 2048),
    Case("llama-2-13b", 16, 64),
    Case("llama-2-13b", 2, 32),
    Case("llama-2-70b", 16, 64, 38),
    Case("llama-2-70b", 2, 32, 38),
)


class Times(NamedTuple):
    """Milliseconds of a step, by what takes them."""

    products: float
    unpacking: float
    unpacking_once: float
    float32: float
    least_float32: float
    adapters: float
    attention: float
    launches: float
    blocks: float  # over PCIe
    head: float  # over PCIe

    @property
    def step(self) -> float:
        """As the code is."""
        computed = self.products + self.unpacking + self.float32 + self.adapters + self.attention
        return max(computed + self.head, self.launches, self.blocks + self.head)

    @property
    def limit(self) -> float:
        """What the device needs at least."""
        computed = self.products + self.unpacking_once + self.least_float32 + self.adapters + self.attention
        return max(computed, self.blocks + self.head)


def times(case: Case, machine: Hardware) -> Times:
    """Of a case on a machine."""
    shape = MODELS[case.model]
    found = costs.of_pass(shape, case.rows, case.length)
    bandwidth, bus = machine.device_bandwidth * BANDWIDTH, machine.host_to_device
    travelling = case.travelling / shape["num_hidden_layers"]
    seconds = {
        "products": found.products / (machine.operations[machine.compute] * PRODUCTS),
        "unpacking": found.unpacking / (machine.device_bandwidth * UNPACKING),
        "unpacking_once": found.unpacking_once / (machine.device_bandwidth * UNPACKING),
        "float32": (found.linear_bytes + found.other_bytes) / bandwidth,
        "least_float32": (found.least_linear_bytes + found.least_other_bytes) / bandwidth,
        "adapters": found.adapter_bytes / bandwidth,
        "attention": found.attention / (machine.operations["float32"] * ATTENTION),
        "launches": found.launches * LAUNCH,
        "blocks": found.packed_bytes * travelling / bus,
        "head": found.head_bytes / bus if case.travelling else 0.0,
    }
    return Times(**{name: 1e3 * value for name, value in seconds.items()})


def main() -> None:
    """Count, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--profile", default="rtx4090-24gb", help="a machine; see hizoo-lite profiles")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    machine = find(arguments.profile)
    rows: list[list[Any]] = []
    figures = []
    for case in CASES[:1] if arguments.quick else CASES:
        one, batch = times(case, machine), f"{case.rows}x{case.length}"
        rows.append([case.model, batch, *(f"{value:.1f}" for value in (*one, one.step, one.limit))])
        figures.append({"model": case.model, "batch": batch, "device": machine.name, "step_ms": one.step})
        figures[-1]["limit_ms"] = one.limit
    columns = ["model", "batch", *(name.replace("_", " ") for name in Times._fields), "step", "limit"]
    publish(f"A step on {machine.name}, ms", columns, rows, {"rows": figures}, arguments)


if __name__ == "__main__":
    main()
