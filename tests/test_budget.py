"""The budget while a run goes on: what is refused is repeated in smaller chunks, with the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.budget import MOST_CHUNK_HALVINGS, Budget, Cap, enforced, is_out_of_memory
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import BudgetError
from hizoo_lite.memory.limits import Budgets
from hizoo_lite.process import resident
from hizoo_lite.run import fit
from hizoo_lite.train.progress import Progress
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch
from tests.run_fixtures import short_run

CPU = torch.device("cpu")


def test_refused_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_pass_is_repeated_in_smaller_chunks_and_gives_the_same_losses(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
    traversal, batch = Traversal(model), tiny_task_batch("causal", rows=8, length=24, ends=[24] * 8)
    wanted = traversal.losses(batch).per_example
    reports: list[str] = []
    budget = Budget(Budgets(10**9, 10**9), model, reports.append)
    traversal.guard = budget.fitting
    rows: list[int] = []

    def refuse_large(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows.append(args[0].shape[0])
        if args[0].shape[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    model.blocks[1].mlp.act_fn.register_forward_pre_hook(refuse_large)  # type: ignore[union-attr, operator]
    got = traversal.losses(batch).per_example
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)  # products with fewer rows round otherwise
    assert rows == [8, 4, 2, 2, 2, 2]
    assert budget.retries == 2
    assert [text.split(":")[0] for text in reports] == ["memory ran out"] * 2


def test_where_nothing_smaller_exists_the_pass_fails(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", device="cpu")
    budget = Budget(Budgets(10**6, 10**6), model)

    def never() -> None:
        raise MemoryError

    with pytest.raises(BudgetError, match="nothing of a pass can be made smaller"):
        budget.fitting(never)
    assert budget.retries == MOST_CHUNK_HALVINGS + 1
    with pytest.raises(RuntimeError, match="another"):
        budget.fitting(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_a_limit_that_rose_is_tried_before_smaller_chunks(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", device="cpu")
    asked: list[bool] = []

    class RisesOnce(Cap):
        def renew(self, *, refused: bool = False) -> bool:
            asked.append(refused)
            return asked.count(True) == 1

    refusals = iter([MemoryError, MemoryError])
    budget = Budget(Budgets(10**9, 10**9), model, cap=RisesOnce())

    def work() -> str:
        for refusal in refusals:
            raise refusal
        return "done"

    assert budget.fitting(work) == "done"
    assert asked == [False, True, True]
    assert (model.chunk_halvings, budget.retries) == (1, 1)


def test_a_peak_over_the_budget_makes_later_chunks_smaller(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", device="cpu")
    reports: list[str] = []
    budget = Budget(Budgets(10**6, 10**6), model, reports.append)
    budget.check(10**6)
    assert (model.chunk_halvings, budget.retries) == (0, 0)
    budget.check(2 * 10**6)
    assert (model.chunk_halvings, budget.retries) == (1, 1)
    assert "1.91 MiB was over the budget" in reports[0]
    Budget(Budgets(None, None), model).check(10**12)
    assert model.chunk_halvings == 1


#: Of a process of its own, which a limit that stays would not hurt.
REFUSED = """
import threading
import torch
from hizoo_lite.engine.budget import enforced, is_out_of_memory
from hizoo_lite.memory.peak import resident
limit = resident().anon_bytes + (200 << 20)
with enforced(limit, torch.device("cpu")):
    held = torch.ones(100 << 20, dtype=torch.uint8)
    try:
        torch.ones(300 << 20, dtype=torch.uint8)
    except RuntimeError as error:
        assert is_out_of_memory(error), error
    else:
        raise SystemExit("was not refused")
    assert resident().anon_bytes < limit
torch.ones(300 << 20, dtype=torch.uint8)
print("refused")
del held
"""
STACKS = """
limit = resident().anon_bytes + (100 << 20)
with enforced(limit, torch.device("cpu")) as cap:
    assert not cap.renew()
    done = threading.Event()
    for _ in range(12):
        threading.Thread(target=done.wait).start()
    try:
        torch.ones(60 << 20, dtype=torch.uint8)
    except RuntimeError:
        assert cap.renew()
        torch.ones(60 << 20, dtype=torch.uint8)
        print("renewed")
    done.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone")
def test_the_system_refuses_anonymous_memory_beyond_the_budget_but_stacks_that_nobody_touches() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = REFUSED + STACKS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "refused\nrenewed\n", done.stderr


def test_no_budget_sets_no_cap() -> None:
    before = resident()
    with enforced(None, CPU):
        assert torch.ones(1 << 20).sum() == 1 << 20
    assert before.total_bytes > 0


def test_a_run_that_meets_refused_memory_goes_on_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    plain = Traversal._losses

    def sometimes(self: Traversal, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError
        return plain(self, *args)  # type: ignore[arg-type]

    wanted = fit(TrainConfig(**short_run(tmp_path / "a", compute_dtype="float32")))
    monkeypatch.setattr(Traversal, "_losses", sometimes)

    class Reader(Progress):
        def message(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    run = fit(TrainConfig(**short_run(tmp_path / "b", compute_dtype="float32")), callbacks=[Reader()])
    assert any("smaller chunks" in text for text in told)
    assert run.summary["memory_retries"] == 1
    assert run.summary["steps"] == 6
    # float32 products with fewer rows, six steps
    assert run.summary["loss_after"] == pytest.approx(wanted.summary["loss_after"], abs=1e-6)


def test_a_run_without_enough_memory_ends_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    plain = Traversal._losses

    def later_never(self: Traversal, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 7:  # those before the steps, and some steps
            raise MemoryError
        return plain(self, *args)  # type: ignore[arg-type]

    settings = short_run(tmp_path, save_every=0)
    monkeypatch.setattr(Traversal, "_losses", later_never)
    with pytest.raises(BudgetError, match=r"step-00000\d is the last good state, --resume goes on"):
        fit(TrainConfig(**settings))
    monkeypatch.setattr(Traversal, "_losses", plain)
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert 0 < steps < 6
    resumed = fit(TrainConfig(**{**settings, "resume": True}))
    assert resumed.summary["steps"] == 6
