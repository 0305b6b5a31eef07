"""The report: figures equal to the run's own, one file that needs nothing else, clear errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from matplotlib.text import Text
from typer.testing import CliRunner

from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.report import draw, headline
from hizoo_lite.report.charts import make_charts, running_mean, thin
from hizoo_lite.report.record import RunRecord, read_run
from hizoo_lite.report.report import as_json, default_page, render, write_report
from hizoo_lite.run import Run, fit
from hizoo_lite.units import format_bytes
from tests.run_fixtures import flags, short_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("reported")
    return fit(TrainConfig(**short_run(folder, lr=1e-2, eval_every=3, device_budget="2GiB")))


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """A copy of the run folder, to be changed."""
    return shutil.copytree(run.folder, tmp_path / "first")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def text_of(page: str) -> str:
    """A page without its tags and styles, as it is read."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []
            self.inside = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inside = tag

        def handle_data(self, data: str) -> None:
            if self.inside != "style":
                self.texts.append(data)

    reader = Reader()
    reader.feed(page)
    return re.sub(r"\s+", " ", " ".join(reader.texts))


def report_of(*folders: Path, plots: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """(text of the page, runs of the JSON); by default without plots, which take seconds."""
    records = [read_run(folder) for folder in folders]
    return text_of(render(records, make_charts(records) if plots else [])), as_json(records)["runs"]


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


# ----------------------------------------------------------------------------------- one run


def test_the_figures_are_those_of_the_summary(run: Run) -> None:
    page = run.report()
    assert page == run.folder / "report.html"
    found = json.loads((run.folder / "report.json").read_text())["runs"][0]
    assert found["summary"] == run.summary
    shown = [key for key in found["headline"] if key in run.summary]
    assert len(shown) >= 14
    assert {key: found["headline"][key] for key in shown} == {key: run.summary[key] for key in shown}
    text = text_of(page.read_text())
    for key in ("loss_before", "loss_after"):
        assert f"{run.summary[key]:.4f}" in text
    assert f", tuned on {run.summary['task']}, " in text
    assert f"evaluate: hizoo-lite eval --adapter {run.folder} ask: hizoo-lite generate --adapter" in text
    assert "2 GiB" in text
    assert f"{run.summary['training_over_inference']:.3f} x" in text
    assert (run.folder / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.grid  # the demo does it, and tests/test_report_browser.py
def test_a_run_has_its_report_drawn_by_a_process_of_its_own(tmp_path: Path) -> None:
    look = "import sys; from hizoo_lite.cli import app; app(sys.argv[1:], standalone_mode=False); "
    look += "raise SystemExit('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look, "train", *flags(short_run(tmp_path, steps=1))],
        capture_output=True,
        text=True,
        env={**os.environ, "HIZOO_LITE_REPORT": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'run/report.html'}" in done.stderr
    made = {path.name for path in (tmp_path / "run").glob("report.*")}
    assert made == {"report.html", "report.json", "report.png"}


def test_the_page_needs_nothing_but_itself(run: Run) -> None:
    page = (run.folder / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert not re.findall(r"url\((?!#)", page)
    assert {urlparse(url).netloc for url in re.findall(r"https?://[^\"' )]+", page)} == {"www.w3.org"}
    assert "default-src 'none'" in page
    assert "mathdefault" not in page  # a label of an axis that matplotlib would have set as a formula


def test_plots_have_the_colours_of_the_page_and_ids_of_their_own(run: Run) -> None:
    page = (run.folder / "report.html").read_text()
    plots = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", plots)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(set(ids)) == len(ids) > 0


def test_every_plot_is_there_with_its_words(run: Run) -> None:
    charts = {chart.key: chart for chart in make_charts([read_run(run.folder)])}
    wanted = {"loss", "memory", "blocks", "projected_grad", "curvature", "lr", "seconds"}
    assert set(charts) == wanted
    loss = {series.label: series.points for series in charts["loss"].series}
    assert [x for x, _ in loss["each step"]] == list(range(6))
    assert [x for x, _ in loss["dev evaluation"]] == [3.0]
    assert [x for x, _ in loss["test evaluation"]] == [0.0, 6.0]
    styles = [series.style for series in charts["loss"].series]
    assert len(set(styles)) == len(styles) == 4
    memory = [series.label for series in charts["memory"].series]
    assert memory[:2] == ["private memory", "mapped files"]
    assert memory[2:] == ["peak of a step", "budget", "peak of the run", "inference peak"]
    assert charts["blocks"].names == ["start", "0", "1", "2", "3", "head", "update"]
    text = text_of((run.folder / "report.html").read_text())
    assert all(chart.title in text for chart in charts.values())


def test_a_plans_bytes_have_units() -> None:
    plan = {"blocks": 4, "ledger": {"device": {"adapters": 3 << 20}}, "moments": {"mlp": 2 << 20}}
    [found] = headline.tables([RunRecord(Path("run"), {}, {}, [], [], plan, {}, [], [])])
    assert dict(row[:2] for row in found.rows) == {
        "blocks": "4",
        "ledger.device.adapters": "3.00 MiB",
        "moments.mlp": "2.00 MiB",
    }


def test_the_rate_of_exact_gradients_is_called_a_share(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for count, line in enumerate(line for line in lines if line["kind"] == "step"):
        line |= {"projected_grad": None, "curvature": None, "lr": 1 - count / 6}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(re.sub(r"(?m)^lr = .*$", 'lr = "auto"', config))
    charts = {chart.key: chart for chart in make_charts([read_run(folder)])}
    assert "lr" not in charts
    assert charts["lr_share"].spoken == "share of the highest rate from 1 to 0.1667"


def test_skipped_and_clipped_steps_are_marked(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    steps[1] |= {"skipped": True, "losses": [None, None, None], "projected_grad": None, "curvature": None}
    steps[2]["clipped"] = True
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    charts = {chart.key: chart for chart in make_charts([read_run(folder)])}
    marks = {mark.label: mark.points for mark in charts["loss"].marks}
    assert marks == {"skipped step": [(1.0, 1.0)], "clipped step": [(2.0, 1.0)]}
    assert len(charts["projected_grad"].series[0].points) == 5
    text, _ = report_of(folder, plots=True)
    assert "1 skipped step; 1 clipped step" in text
    assert "1 clipped" in text


def test_predicted_stands_beside_measured(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps({"owners": {"weights": 2**20}, "residency": "resident"}))
    measured = [
        {"owner": "weights", "predicted_bytes": 2**20, "measured_bytes": 3 * 2**19},
        {"owner": "libraries", "predicted_bytes": None, "measured_bytes": 2**30},
    ]
    edit(folder, "memory.json", lambda memory: memory.update(owners=measured))
    text, (found,) = report_of(folder)
    assert "weights predicted 1.00 MiB measured 1.50 MiB" in text
    assert f"libraries predicted {headline.DASH} measured 1.00 GiB" in text
    assert found["owners"][0] == {"owner": "libraries", "predicted_bytes": None, "measured_bytes": 2**30}
    assert not found["missing"]


def test_a_run_on_cuda_shows_its_allocator(folder: Path) -> None:
    places: list[Any] = [None, 0, 1, "head", "update"]
    samples = [
        {"seconds": 0.1 * i, "step": 0, "phase": "train", "block": place}
        | {"allocated_bytes": (5 + i) * 2**30, "reserved_bytes": 12 * 2**30}
        for i, place in enumerate(places)
    ]
    edit(folder, "memory.json", lambda memory: memory.update(samples=samples, step_peaks=[[0, 11 * 2**30]]))
    charts = {chart.key: chart for chart in make_charts([read_run(folder)])}
    assert [s.label for s in charts["memory"].series][:2] == ["allocated (CUDA)", "reserved (CUDA)"]
    assert charts["memory"].y_label == "GiB"
    assert charts["blocks"].series[0].points == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_an_older_run_says_what_is_missing(folder: Path) -> None:
    (folder / "memory.json").unlink()
    (folder / "plan.json").unlink()
    text, _ = report_of(folder)
    assert "memory.json is missing: memory was not sampled, only its peak is known." in text
    assert "plan.json is missing" in text
    assert "Memory through the blocks" not in text


def test_a_run_that_was_killed_has_a_report(folder: Path) -> None:
    for name in ("memory.json", "summary.json"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    text, (found,) = report_of(folder)
    figures = found["headline"]
    assert (figures["steps"], figures["forward_passes"], figures["loss_after"]) == (1, 2, None)
    before = json.loads(lines[0])
    assert (figures["loss_before"], figures["metric_before"]) == (before["loss"], before["accuracy"])
    assert figures["seconds_per_step"] == json.loads(lines[1])["seconds"]
    assert "the run did not come to an end" in text
    (folder / "metrics.jsonl").write_text("")
    assert "Loss" in text_of(write_report([folder]).html.read_text())


def test_what_is_not_finite_is_a_dash(folder: Path) -> None:
    (folder / "summary.json").write_text(
        (folder / "summary.json").read_text().replace('"loss_after": ', '"loss_after": NaN, "x": ')
    )
    text, (found,) = report_of(folder)
    assert found["headline"]["loss_after"] is None
    assert re.search(rf"Loss {headline.DASH} before 0\.", text)
    assert "nan" not in text.lower()


def test_texts_of_the_run_are_escaped(folder: Path) -> None:
    nasty = "<script>alert('$x^')</script>"
    edit(folder, "summary.json", lambda s: s.update(task=nasty, model="a & b", metric="<b>accuracy"))
    edit(folder, "memory.json", lambda m: m.update(owners=[{"owner": nasty, "measured_bytes": 5}]))
    renamed = folder.rename(folder.parent / "run <i>& $co^")
    written = write_report([renamed])
    page = written.html.read_text()
    assert "<script" not in page
    assert "<i>" not in page
    assert "<b>" not in page
    assert nasty in text_of(page)
    assert written.png.is_file()
    records = [read_run(renamed)] * 2
    assert "<script" not in render(records, make_charts(records))


# ----------------------------------------------------------------------------------- two runs


def test_two_runs_are_compared(run: Run, folder: Path) -> None:
    other = folder.rename(folder.parent / "second")
    edit(other, "summary.json", lambda s: s.update(loss_after=s["loss_after"] + 0.5, seconds_per_step=None))
    config = (other / "config.toml").read_text().replace("rank = 2", "rank = 4")
    (other / "config.toml").write_text(config)
    written = write_report([run.folder, other], other.parent / "both.html")
    assert {path.name for path in written} == {"both.html", "both.json", "both.png"}
    found = json.loads(written.json.read_text())
    assert [part["name"] for part in found["runs"]] == ["run", "second"]
    assert found["differences"]["loss_after"] == pytest.approx(0.5)
    assert "seconds_per_step" not in found["differences"]
    page = written.html.read_text()
    text = text_of(page)
    assert "loss after" in text
    assert "+0.5000" in text
    assert "run: running mean" in text
    assert "second: running mean" in text
    rank = re.search(r"<tr([^>]*)><th[^>]*>rank</th><td>2</td><td>4</td>", page)
    seed = re.search(r"<tr([^>]*)><th[^>]*>seed</th><td>0</td><td>0</td>", page)
    assert rank is not None
    assert seed is not None
    assert ("changed" in rank[1], "changed" in seed[1]) == (True, False)
    assert default_page([read_run(run.folder), read_run(other)]) == run.folder / "report-with-second.html"


def test_runs_of_one_name_are_told_apart(run: Run) -> None:
    assert headline.labels([read_run(run.folder)] * 2) == ["run (A)", "run (B)"]


@pytest.mark.parametrize(
    ("first", "second", "unit", "shown"),
    [
        (0.5, 0.625, "share", "+12.5 points"),
        (2.0, 1.0, "number", "-1.0000 (-50.0\u00a0%)"),
        (0.0, 2**20, "bytes", "+1.00 MiB"),
        (3, 3, "count", "±0"),
        (None, 1.0, "seconds", headline.DASH),
    ],
)
def test_differences_are_signed(first: float | None, second: float | None, unit: Any, shown: str) -> None:
    assert headline.difference(first, second, unit) == shown


# ------------------------------------------------------------------------------------ drawing


def test_thinned_points_keep_spikes() -> None:
    points = [(float(i), 100.0 if i == 7777 else i % 3) for i in range(20_000)]
    few = thin(points)
    assert len(few) <= 800
    assert (7777.0, 100.0) in few
    assert few == sorted(few)
    assert thin(points[:10]) == points[:10]


def test_a_running_mean_of_equal_values_is_that_value() -> None:
    assert all(y == pytest.approx(3.0) for _, y in running_mean([(float(i), 3.0) for i in range(500)]))


@pytest.mark.parametrize("sizes", [(3e8, *(2.0**n for n in range(14, -1, -1))), (3e8, 3e8)], ids=len)
def test_the_texts_beside_bars_do_not_overlap(sizes: tuple[float, ...]) -> None:
    bars = [headline.Category(f"category {n}", size, size, 1.0, 1.0) for n, size in enumerate(sizes)]
    figure = draw.picture([], {"run": bars}, "run")
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = {f"{n} {text.get_text()}": text.get_window_extent() for n, text in enumerate(shown)}
    assert len(boxes) >= 3 * len(bars)
    crossing = [pair for pair in combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]
    assert crossing == []


# ------------------------------------------------------------------------------------- errors


def truncate(folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-20])


ERRORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (truncate, r"metrics\.jsonl: line \d+ is cut off"),
    "cut off inside": (
        lambda f: (f / "metrics.jsonl").write_text('{"kind": "st\n'),
        r"metrics\.jsonl: line 1 is not valid JSON",
    ),
    "no record": (
        lambda f: (f / "metrics.jsonl").write_text("[1]\n"),
        r"metrics\.jsonl: line 1 is no record",
    ),
    "summary": (lambda f: (f / "summary.json").write_text("{,"), r"summary\.json: not valid JSON"),
    "memory": (lambda f: (f / "memory.json").write_text('"x"'), r"memory\.json: got a str, allowed: a JSON"),
    "plan": (lambda f: (f / "plan.json").write_bytes(b"\xff\xfe"), r"plan\.json: not valid JSON"),
    "config": (lambda f: (f / "config.toml").write_text("steps = "), r"config\.toml: not valid TOML"),
    "no run": (shutil.rmtree, r"RUN: got '.*', allowed: a run folder"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_unsound_run_is_one_message_that_names_the_file(folder: Path, case: str) -> None:
    damage, message = ERRORS[case]
    damage(folder)
    done = call(str(folder))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert re.match(f"error: .*{message}", done.stderr)
    assert done.stderr.count("\n") == 1


def test_a_page_that_cannot_be_written_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--out: got '.*page', allowed: a file name that ends in \.html"):
        write_report([folder], folder / "page")
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .* cannot be written"):
        write_report([folder], folder / "file/page.html")


def test_a_report_that_fails_leaves_the_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 2, "", "error: no room")
    monkeypatch.setattr("hizoo_lite.run.run_module", lambda *_: failed)
    monkeypatch.setenv("HIZOO_LITE_REPORT", "1")
    done = CliRunner().invoke(app, ["train", *flags(short_run(tmp_path, steps=1))])
    assert done.exit_code == 0, done.stderr
    assert "no report: no room" in done.stderr


# ------------------------------------------------------------------------------- command line


def test_report_prints_its_files_or_its_json(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new/page.html"
    done = call(str(run.folder), "--out", str(out))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split() == [str(out.with_suffix(s)) for s in (".html", ".json", ".png")]
    done = call(str(run.folder), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["summary"]["steps"] == 6


def test_bytes_on_cards_have_three_digits() -> None:
    assert headline._short(496.84 * 2**20) == "497 MiB"
    assert headline._short(1015.6 * 2**10) == format_bytes(int(1015.6 * 2**10))
    assert headline._short(12) == "12 B"
    assert headline._short(None) == headline.DASH
