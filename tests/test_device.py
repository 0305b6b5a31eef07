"""What is asked of a device: nothing goes past `device.py`, and a GPU's budget, index and precision hold."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hizoo_lite import device as devices
from hizoo_lite.cli import doctor
from hizoo_lite.device import CONTEXT_BYTES, choose_device, choose_type, like
from hizoo_lite.engine import budget, chunks, traversal
from hizoo_lite.errors import BudgetError, UserError
from hizoo_lite.model import linear
from hizoo_lite.plan import speed
from hizoo_lite.spaces import weights

PACKAGE = Path(devices.__file__).parent
TOOLS = PACKAGE.parent / "tools"
GIB = 2**30
CUDA = torch.device("cuda", 1)


class Driver:
    """A CUDA driver of two cards with 23.6 GiB, of which `outside` are somebody else's."""

    total, outside = int(23.6 * GIB), 700 << 20

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fractions: list[tuple[float, int]] = []
        runtime = SimpleNamespace(cudaMemGetInfo=lambda index: (self.total - self.outside, self.total))
        for name, answer in {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: 1,
            "cudart": lambda: runtime,
            "memory_stats_as_nested_dict": lambda device: {},
            "get_device_properties": lambda device: SimpleNamespace(total_memory=self.total, name="a card"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
        monkeypatch.setattr(
            torch._C, "_cuda_setMemoryFraction", lambda *given: self.fractions.append(given), raising=False
        )

    @property
    def cap_bytes(self) -> list[int]:
        """What the allocator was allowed, one cap after the other."""
        return [round(share * self.total) for share, _ in self.fractions]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return Driver(monkeypatch)


def test_no_other_module_asks_torch_cuda() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr in ("cuda", "backends", "is_cuda")
            of_torch = named and isinstance(node.value, ast.Name | ast.Call | ast.Attribute)
            moved = isinstance(node, ast.keyword) and node.arg == "pin_memory"
            compared = (
                isinstance(node, ast.Compare)
                and isinstance(node.left, ast.Attribute)
                and node.left.attr == "type"
                and any(isinstance(x, ast.Constant) and x.value == "cuda" for x in node.comparators)
            )
            imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda")
            if of_torch or moved or compared or imported:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")  # type: ignore[attr-defined]
    assert {place.split(":")[0] for place in found} == {"device.py"}, found


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:0"])
def test_a_device_has_its_index_and_a_budget_of_it_holds(wanted: str, driver: Driver) -> None:
    device = choose_device(wanted)
    assert device == torch.device("cuda", 0 if wanted == "cuda:0" else 1)
    with budget.enforced(8 * GIB, device):
        pass
    assert driver.fractions[-1] == (1.0, device.index)
    assert driver.cap_bytes[0] == 8 * GIB - CONTEXT_BYTES


def test_what_others_have_of_a_device_is_taken_off_once(driver: Driver) -> None:
    driver.outside = 3 * GIB  # a context, a desktop, a browser
    with budget.enforced(22 * GIB, CUDA):
        assert driver.cap_bytes == [driver.total - driver.outside]
        driver.outside = 0  # they have ended: what blocks may take is what the cap allows all the same
        assert devices.gpu_of(CUDA).allowance(22 * GIB, CUDA) == driver.total - 3 * GIB
    with budget.enforced(23 * GIB, CUDA):  # of a profile that has left 1 GiB for them
        assert driver.cap_bytes[-1] == 23 * GIB - CONTEXT_BYTES
    with pytest.raises(BudgetError, match=r"got 500\.00 MiB, but 600\.00 MiB of the device are taken"):
        budget.enforced(500 << 20, CUDA).__enter__()


def test_a_card_smaller_than_the_benchmarks_cap_is_used_as_it_is(driver: Driver) -> None:
    sys.path.insert(0, str(TOOLS))
    import bench_step

    monkey: Any = torch.cuda
    monkey.mem_get_info = lambda: (0, driver.total)  # undone with the driver's other answers
    bench_step.cap_device(24)
    assert driver.fractions == [(1.0, 1)]


@pytest.mark.grid
def test_a_benchmark_that_does_not_start_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    import bench_step

    with pytest.raises(SystemExit, match="step: ended"):
        bench_step.Contender("step", "no_such_folder", "cpu", "float32", None)
    assert "no_such_folder" in capfd.readouterr().err


def test_ranks_have_a_gpu_each(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, index in ((0, 0), (1, 1), (3, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device("cuda") == torch.device("cuda", index)
    with pytest.raises(UserError, match="device: got 'cuda:1', but a launcher has started 4 processes"):
        choose_type("cuda:1")
    assert choose_type("cpu") == ("cpu", None)


def test_devices_that_are_not_there_are_refused(driver: Driver) -> None:
    with pytest.raises(UserError, match="device: got 'cuda:2', but there are 2 CUDA devices here"):
        choose_device("cuda:2")
    for wanted in ("mps", "tpu"):
        with pytest.raises(UserError, match=f"device: got '{wanted}', allowed are auto, cpu, cuda"):
            choose_device(wanted)


def test_every_gpu_has_the_figures_of_cuda() -> None:
    class Other(devices.Gpu):
        type = "other"

    devices.register(SimpleNamespace(type="other", like=Other.like))  # type: ignore[arg-type]
    try:
        tables = (
            *(linear.TILE_BYTES, chunks.LEAST_TOKENS, chunks.LEAST_TOKENS_REDRAWN, traversal.TERMS_BYTES),
            *(weights.TILE_ELEMENTS, speed._COPIED_BYTES),
        )
        assert all(table[like("other")] == table["cuda"] for table in tables)
        assert chunks.plan_chunks("auto", 8, 32, 3, "other") == chunks.plan_chunks("auto", 8, 32, 3, "cuda")
        assert weights.tiles((4096, 4096), 1, "other") == weights.tiles((4096, 4096), 1, "cuda")
    finally:
        del devices._KINDS["other"]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_libraries_that_get_no_memory_are_refused_memory(text: str) -> None:
    assert budget.is_out_of_memory(RuntimeError(text))
    assert not budget.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_bandwidth_is_not_that_of_a_cache() -> None:
    assert speed._COPIED_BYTES["cuda"] >= 8 * (96 << 20)  # the L2 of a 5090


# ------------------------------------------------------------------------------------------- precision


def test_products_of_a_gpu_are_exact_whatever_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import torch; from hizoo_lite.device import Cuda; m = torch.backends.cuda.matmul\n"
        "before = m.allow_tf32; Cuda().prepare()\n"
        "print(before, m.allow_tf32, m.allow_bf16_reduced_precision_reduction, "
        "m.allow_fp16_reduced_precision_reduction)"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "False", "False"], done.stderr


def test_an_environment_that_rounds_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UserError, match="NVIDIA_TF32_OVERRIDE: got 1; allowed: 0, or unset"):
        devices.Cuda().prepare()
    devices.Cpu().prepare()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    devices.Cuda().prepare()


def test_doctor_names_what_rounds_products(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ACCELERATE_DYNAMO_BACKEND")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    sound = {"quantization": {}, "cuda": ["one"], "disk_free_bytes": 1 << 40, "device": "cuda", "hub": "on"}
    report = {**sound, "compute_dtype": "bf16"}
    assert (doctor._problems(report), doctor._notes(report)) == ([], [])
    for name, value in zip(names, ("1", "1", "inductor"), strict=True):
        monkeypatch.setenv(name, value)
    found = [*doctor._problems(report), *doctor._notes(report)]
    assert [text.split()[0] for text in found] == list(names)


def test_defaults_of_libraries_are_set_before_a_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*devices._DEFAULTS, *devices._ALLOCATOR)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    choose_device("auto")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_P2P_DISABLE"] == "0"  # as it was given
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    choose_device("auto")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
