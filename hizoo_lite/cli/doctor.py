"""`hizoo-lite doctor`: what this machine can do, and what stands in the way, with what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hizoo_lite.units import format_bytes

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
#: Below this much free disk the caches of the hub and the shards of a model do not fit.
_LITTLE_DISK_BYTES = 5 * 2**30
#: Largest deviation of a quantize / unpack round trip: half the widest gap between NF4 codes (0.304 / 2).
_NF4_HALF_GAP = 0.1521


def command(
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="rates of products, copies and disk")] = False,
    out: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="write them as a profile for `hizoo-lite plan`")
    ] = None,
) -> None:
    """Tell what this machine can do: libraries, processor, memory, GPUs, 4-bit kernels, hub.

    Examples:

    hizoo-lite doctor

    hizoo-lite doctor --measure --out here.toml

    hizoo-lite doctor --json
    """
    from hizoo_lite.cli import output

    output.say_loading()
    report = examine()
    if measure or out is not None:
        report["measured"] = _measure(out)
    if json:
        output.print_json(report)
        return
    rows = [
        [name.removesuffix("_bytes"), _shown(name, value)]
        for name, value in report.items()
        if name not in ("problems", "notes")
    ]
    output.print_table("hizoo-lite doctor", ["what", "here"], rows)
    for problem in report["problems"]:
        typer.echo(f"problem: {problem}")
    for note in report["notes"]:
        typer.echo(f"note: {note}")
    if not report["problems"]:
        typer.echo("no problems found")


def _measure(out: str | None) -> dict[str, Any]:
    """A few seconds of measuring on the device of a run; a profile of it in `out`."""
    from hizoo_lite.device import choose_device
    from hizoo_lite.plan import speed

    device = choose_device("auto")
    found = speed.measure(device)
    if out is not None:
        speed.write_profile(Path(out), found, device)
        typer.echo(f"wrote {out}", err=True)
    return found


def examine() -> dict[str, Any]:
    """The whole report; `problems` are sentences with what to do, `notes` ask for nothing."""
    import psutil

    from hizoo_lite.checkpoints import hub
    from hizoo_lite.device import choose_device
    from hizoo_lite.model.build import choose_compute
    from hizoo_lite.train.summary import versions

    disk = shutil.disk_usage(Path.cwd())
    device = choose_device("auto")
    quantization = _check_quantization()
    report: dict[str, Any] = {
        "versions": versions(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": disk.free,
        "cuda": _cuda(),
        "device": str(device),
        "compute_dtype": str(choose_compute("auto", device)).removeprefix("torch."),
        "quantization": quantization,
        "hub": hub.reach(),
    }
    report["problems"], report["notes"] = _problems(report), _notes(report)
    return report


def _cpu() -> dict[str, Any]:
    import psutil
    import torch

    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "flags": [flag for flag in _CPU_FLAGS if flag in present],
    }


def _cuda() -> list[dict[str, Any]]:
    from hizoo_lite.device import Cuda

    cuda = Cuda()
    found: list[dict[str, Any]] = []
    for index in range(cuda.count()):
        device = cuda.device(index)
        major, minor = cuda.capability(device)
        found.append(
            {
                "name": cuda.name(device),
                "memory_bytes": cuda.total_bytes(device),
                "capability": f"{major}.{minor}",
                "bf16": major >= 8,
            }
        )
    return found


def _check_quantization() -> dict[str, str]:
    """Quantize and unpack a small matrix on the device of a run; "works", or what went wrong."""
    import torch

    from hizoo_lite.device import choose_device
    from hizoo_lite.quant import pack

    weight = torch.linspace(-1, 1, 64 * 128, device=choose_device("auto")).reshape(64, 128)
    found = {}
    for bits, bound in (("nf4", _NF4_HALF_GAP), ("int8", 1 / 127)):
        try:
            back = torch.empty_like(weight)
            packed = pack(weight, bits, double_quant=False)  # type: ignore[arg-type]
            packed.unpack(back)
            if packed.row_scale is not None:
                back *= packed.row_scale[:, None]
        except (RuntimeError, OSError, AttributeError) as error:
            found[bits] = f"fails: {type(error).__name__}: {error}"
            continue
        worst = float((back - weight).abs().max())
        found[bits] = (
            "works" if worst <= bound else f"wrong: off by {worst:.3f}, expected at most {bound:.3f}"
        )
    return found


def _problems(report: dict[str, Any]) -> list[str]:
    found = [
        f"{bits} quantization {state}; reinstall bitsandbytes, or use --bits none"
        for bits, state in report["quantization"].items()
        if state != "works"
    ]
    if not report["cuda"] and shutil.which("nvidia-smi"):
        found.append("an NVIDIA driver is here but torch sees no GPU; install a CUDA build of torch")
    if os.environ.get("NVIDIA_TF32_OVERRIDE", "") not in ("", "0"):
        found.append("NVIDIA_TF32_OVERRIDE is set: no model is loaded on a GPU with it; unset it")
    if report["disk_free_bytes"] < _LITTLE_DISK_BYTES:
        found.append(
            "less than 5 GiB of disk are free here: models and runs may not fit; make room, or work in a "
            "folder on another disk"
        )
    return found


def _notes(report: dict[str, Any]) -> list[str]:
    """What is slower or missing here, and what would round products on a GPU (TF32) but does not."""
    found = []
    if report["hub"].startswith("no answer"):
        found.append(
            "the hub is not reached: local folders and what is in its cache can be used; behind a proxy set "
            "HTTPS_PROXY, without a network HF_HUB_OFFLINE=1"
        )
    if report["device"] == "cpu" and report["compute_dtype"] == "float32":
        found.append("this CPU has no bf16 products: float32 is used, steps are slower")
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "") not in ("", "0"):
        found.append("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set: runs go without TF32 all the same")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() not in ("NO", ""):
        found.append("ACCELERATE_DYNAMO_BACKEND is set, which allows TF32: runs go without it all the same")
    return found


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value / 1e9:.3g}e9/s"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(key, item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(name, item) for item in value) or "none"
    return format_bytes(value) if name.endswith("_bytes") else str(value)
