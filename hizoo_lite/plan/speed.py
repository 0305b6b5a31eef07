"""How fast this machine is, measured in a few seconds, and written as a hardware profile for the planner."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from hizoo_lite.device import is_gpu, kind_of, like
from hizoo_lite.errors import UserError
from hizoo_lite.tensors import page_lock

#: Seconds that one figure may take.
_PATIENCE = 1.0
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
#: Bytes that are read from a file, and copied: on a GPU many times what its cache holds (72 MB of a 4090).
_FILE_BYTES = 64 << 20
_COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def measure(device: torch.device) -> dict[str, Any]:
    """Operations a second of products by dtype; bytes a second of copies and of a file that is not cached."""
    found: dict[str, Any] = {
        "operations": {name: _products(dtype, device) for name, dtype in _used(device).items()},
        "device_bandwidth": _copies(device),
        "disk": _disk(),
    }
    if is_gpu(device):
        found["host_to_device"] = _host_to_device(device)
    return found


def profile_text(measured: dict[str, Any], device: torch.device, name: str) -> str:
    """A hardware profile in TOML. Rates are measured, so all of them are reached: efficiency is 1."""
    gpu, memory = is_gpu(device), kind_of(device).total_bytes(device)
    host = psutil.virtual_memory()
    lines = [
        "# Measured by `hizoo-lite doctor --measure`.",
        f'name = "{name}"',
        f'device = "{like(device)}"',
        f'device_memory = "{memory}B"',
        f'device_reserved = "{memory // 20 if gpu else max(1, host.total - host.available)}B"',
    ]
    if gpu:
        lines += [
            f'host_memory = "{host.total}B"',
            f'host_reserved = "{max(1, host.total - host.available)}B"',
        ]
    for key in ("device_bandwidth", "host_to_device", "disk"):
        if key in measured:
            lines.append(f'{key} = "{int(measured[key])}B"')
    lines += ["efficiency = 1.0", "", "[operations]"]
    lines += [f"{dtype} = {rate:.4g}" for dtype, rate in measured["operations"].items()]
    return "\n".join(lines) + "\n"


def write_profile(path: Path, measured: dict[str, Any], device: torch.device) -> None:
    """Write the profile. `UserError` if the file is there already or cannot be written."""
    if path.exists():
        raise UserError(f"--out: {path} is there already; allowed: a new file")
    try:
        path.write_text(profile_text(measured, device, path.stem), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror}") from error


def _used(device: torch.device) -> dict[str, torch.dtype]:
    """fp16 products are of no use on a CPU, bf16 ones if it has no instructions for them."""
    from hizoo_lite.model.build import choose_compute

    chosen = choose_compute("auto", device)
    return {n: d for n, d in _DTYPES.items() if d in (chosen, torch.float32) or is_gpu(device)}


def _products(dtype: torch.dtype, device: torch.device) -> float:
    size, inner = (4096, 4096) if is_gpu(device) else (512, 2048)
    left = torch.ones(size, inner, dtype=dtype, device=device)
    right = torch.ones(inner, inner, dtype=dtype, device=device)
    out = torch.empty(size, inner, dtype=dtype, device=device)
    seconds = _best(lambda: torch.mm(left, right, out=out), device)
    return 2.0 * size * inner * inner / seconds


def _copies(device: torch.device) -> float:
    """Bytes read and written a second."""
    size = _COPIED_BYTES[like(device)]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _host_to_device(device: torch.device) -> float:
    size = _COPIED_BYTES[like(device)]
    source = torch.ones(size, dtype=torch.uint8)
    page_lock(source, device)
    target = torch.empty_like(source, device=device)
    return size / _best(lambda: target.copy_(source, non_blocking=True), device)


def _disk() -> float:
    """A file in the current folder, its pages dropped from the cache before it is read."""
    block = memoryview(bytearray(1 << 20))
    with tempfile.TemporaryFile(dir=Path.cwd(), buffering=0) as file:
        for _ in range(_FILE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        done = 0
        while count := file.readinto(block):
            done += count
        return done / (time.perf_counter() - began)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of some calls, the first not counted."""
    times: list[float] = []
    kind = kind_of(device)
    work()
    until = time.perf_counter() + _PATIENCE
    while len(times) < 3 or (time.perf_counter() < until and len(times) < 20):
        kind.synchronize(device)
        began = time.perf_counter()
        work()
        kind.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)
