"""tools/bench_quality.py: what its figures are made of, and the task whose data it makes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_quality
import pytest
import tickets
from bench_quality import Rows, run_cell
from quality_cells import CELLS, TICKETS
from quality_summary import MOST, headline, to_mezo

from hizoo_lite import tasks
from hizoo_lite.errors import TooManyBadSteps


def row(cell: str, method: str, seed: int = 0, budget: int = 450, **more: Any) -> dict[str, Any]:
    """A run of four evaluations on dev; its loss falls from 1."""
    losses = more.pop("losses", (0.9, 0.8, 0.7, 0.75))
    counts = (budget // 3, 2 * budget // 3, budget, budget)
    curve = [[n, loss, 0.5, n / 10] for n, loss in zip(counts, losses, strict=True)]
    made = {
        "lr": None,
        "forwards": budget,
        "curve": curve,
        "loss_after": losses[-1],
        "metric_after": 0.5,
        "seconds": budget / 10,
        "batch_size": 16,
        "kept_examples": 0,
        "peak_bytes": 110,
        "inference_peak_bytes": 100,
    }
    return {"cell": cell, "method": method, "seed": seed, "budget": budget, **made, **more}


def test_every_cell_has_a_task() -> None:
    for cell in CELLS.values():
        if cell.task not in ("", TICKETS):
            assert tasks.get(cell.task).name == cell.task


def test_costs_are_until_a_run_is_as_good_as_mezo_becomes() -> None:
    mezo = [
        row("smollm2-sst2", "mezo", lr=0.1, losses=(0.9, 0.8, 0.7, 0.75)),  # at its best after 450
        row("smollm2-sst2", "mezo", lr=0.2, losses=(0.9, 0.9, 0.9, 0.9)),
        row("smollm2-sst2", "mezo, A trained", lr=0.2, losses=(0.9, 0.8, 0.8, 0.8)),
    ]
    own = [
        row("smollm2-sst2", "hizoo", 0, losses=(0.7, 0.6, 0.6, 0.6), kept_examples=800),
        row("smollm2-sst2", "hizoo", 1, losses=(0.8, 0.6, 0.6, 0.6)),
        row("smollm2-sst2", "hizoo", 1, budget=150, losses=(0.9, 0.8, 0.7, 0.7)),
        row("smollm2-sst2", "hizoo", 2, losses=(0.9, 0.9, 0.9, 0.9)),
    ]
    found = to_mezo([*mezo, *own])["smollm2-sst2"]
    assert found["mezo_loss"] == 0.7
    assert found["forwards"]["mezo"] == 16 * 450
    assert found["forwards"]["ratios"] == {0: (16 * 150 + 800) / (16 * 450), 1: 150 / 450, 2: None}
    assert found["seconds"] == {"mezo": 45.0, "ratios": {0: 15 / 45, 1: 15 / 45, 2: None}}
    summary = headline([*mezo, *own])
    assert summary["smollm2_forwards_ratio"] == pytest.approx(4 / 9)
    assert summary["smollm2_seconds_ratio"] == pytest.approx(1 / 3)
    never = [
        row("smollm2-rte", "mezo"),
        *(row("smollm2-rte", "hizoo", seed, losses=(1.0,) * 4) for seed in range(4)),
    ]
    assert headline([*mezo, *own, *never])["smollm2_forwards_ratio"] is None  # most seeds never are
    json.dumps(to_mezo([*mezo, *own, *never]), allow_nan=False)
    old = [{k: v for k, v in one.items() if k != "kept_examples"} for one in (*mezo, *own)]
    assert headline(old)["smollm2_forwards_ratio"] is None
    assert headline(old)["smollm2_seconds_ratio"] == pytest.approx(1 / 3)


def test_the_summary_is_of_medians_with_the_most_forwards() -> None:
    rows = [
        *(row("minilm-sst2", "hizoo", s, MOST, metric_after=0.6 + s / 10) for s in range(3)),
        row("minilm-sst2", "hizoo", 0, MOST + 1, metric_after=0.9),
        row("minilm-sst2", "hizoo", 0, 300, metric_after=0.1),
        row("minilm-sst2", "exact, 6 blocks", metric_after=0.81),
        row("smollm2-sst2", "exact, 6 blocks", metric_after=0.84),
        row("smollm2-sst2", "backpropagation", metric_after=0.85),
        row("smollm2-sst2", "mezo", lr=0.1),
        row("smollm2-sst2", "hizoo, as published", losses=(0.9, 0.8, 0.75, 0.75)),  # never as good
        row("smollm2-sst2", "hizoo, as published, tuned", lr=0.1, losses=(0.9, 0.7, 0.75, 0.75)),
        row("smollm2-sst2", "hizoo", losses=(0.1, 0.1, 0.1, 0.1), metric_after=0.8, loss_after=0.44),
        row("smollm2-tickets", "exact, 6 blocks", metric_after=1.0, peak_bytes=113),
        row("smollm2-tickets", "exact, 6 blocks", 1, metric_after=0.9, peak_bytes=115),
        row("smollm2-tickets", "hizoo", metric_after=0.75),
    ]
    found = headline(rows)
    wanted = {
        "minilm_sst2_accuracy": 0.7,
        "minilm_sst2_exact_accuracy": 0.81,
        "smollm2_sst2_exact_accuracy": 0.84,
        "exact_peak_over_inference": 1.14,
        "own_data_accuracy": 0.95,
        "own_data_forward_accuracy": 0.75,
        "gap_to_backprop_points": 1.0,
        "defaults_smollm2_sst2_accuracy": 0.8,
        "defaults_smollm2_sst2_loss": 0.44,
        "hizoo_over_mezo": 2 / 3,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    both = [*rows, row("minilm-sst2", "exact, all blocks", metric_after=0.82)]
    assert headline(both)["minilm_sst2_exact_accuracy"] == 0.82


def test_what_is_not_there_is_null() -> None:
    found = headline([])
    assert len(found) == 12
    assert set(found.values()) == {None}
    assert set(headline([row("demo", "hizoo", curve=[])]).values()) == {None}


def test_tickets_are_a_users_own_task(tmp_path: Path) -> None:
    task = tasks.get(tickets.write(tmp_path / "a"))
    splits = tasks.make_splits(
        task, tmp_path / "a", train_examples=1000, dev_examples=100, test_examples=1000
    )
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (260, 60, 60)
    assert all(len(team.split()) == 2 for team in task.labels)
    assert len(task.labels) == 4
    assert min(Counter(example.gold for example in splits.train).values()) > 50
    everything = [example for part in (splits.train, splits.dev, splits.test) for example in part]
    assert len({example.fields["text"] for example in everything}) == 380
    for example in everything:  # what is said is of one team alone
        text = example.fields["text"].lower()
        said = {team for team, phrases in tickets.TROUBLES.items() for p in phrases if p.lower() in text}
        assert said == {task.labels[example.gold]}
    tickets.write(tmp_path / "b")
    tickets.write(tmp_path / "c", seed=1)
    texts = [(tmp_path / folder / "train.jsonl").read_text() for folder in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_the_configuration_of_tickets_names_the_files_that_are_made(tmp_path: Path) -> None:
    arguments = SimpleNamespace(results=tmp_path, quick=False, device="cpu", threads=1)
    config = bench_quality.configuration(CELLS["smollm2-tickets"], tmp_path, 3, arguments)
    assert Path(config.task).is_file()
    assert (Path(str(config.data)) / "test.jsonl").is_file()
    assert (config.batch_size, config.seed) == (8, 3)


def test_what_a_run_computes_beforehand_counts() -> None:
    kept = bench_quality.Clock()
    for when, examples in (("before", 7), (bench_quality.HIDDEN, 5), ("dev", 3)):
        kept.on_evaluate_begin(None, None, None, when=when, examples=examples)
        kept.on_prediction_step(None, None, None, examples=examples)
    assert kept.examples == 5
    assert kept.seconds > 0


def test_the_processor_is_counted_in_steps_and_hidden_states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = bench_quality.Clock(), iter([1.0, 3.0, 10.0, 14.0])  # hidden states 2 s, a step 4 s
    monkeypatch.setattr(bench_quality.time, "process_time", lambda: next(now))
    clock.on_evaluate_begin(None, None, None, when=bench_quality.HIDDEN)
    clock.on_prediction_step(None, None, None, examples=5)
    clock.on_evaluate_begin(None, None, None, when="dev")
    clock.on_prediction_step(None, None, None, examples=3)
    clock.on_step_begin(None, None, None)
    clock.on_step_end(None, None, None)
    assert clock.processor == 6.0


def test_a_rate_at_which_a_run_breaks_does_not_end_the_bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def run(arguments: Any, work: Any, config: Any, method: Any, budget: int, lr: float) -> dict[str, Any]:
        tried.append((config.seed, lr))
        if lr == max(CELLS["demo"].mezo):
            raise TooManyBadSteps("10 losses were not finite")
        return {"forwards": budget, "curve": [], "loss_after": lr, "metric_after": 0.5}

    monkeypatch.setattr(bench_quality, "alone", run)
    arguments = SimpleNamespace(seeds=[0, 1], models=tmp_path, threads=1, device="cpu", quick=False)
    for _ in range(2):  # the second time everything is there, however it ended
        run_cell("demo", ["mezo"], 300, Rows(tmp_path), arguments)
    rates = CELLS["demo"].mezo
    assert tried == [*((0, lr) for lr in rates), (1, min(rates))]
    assert max(rates) not in [row["lr"] for row in Rows(tmp_path).all()]
