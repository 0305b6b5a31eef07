"""The report in a real browser, from disk: no error, nothing wider than the window, everything there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hizoo_lite.config import TrainConfig
from hizoo_lite.report.report import write_report
from hizoo_lite.run import Run, fit
from tests.browser import Page, browser, missing
from tests.run_fixtures import short_run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

#: Letters below this many pixels are hard to read.
SMALLEST_PIXELS = 11.5


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("reported")
    run = fit(TrainConfig(**short_run(folder, lr=1e-2, eval_every=3, device_budget="2GiB")))
    owners = {"weights": 3 << 30, "a_name_without_a_place_to_break_" * 4: 1 << 20}
    (run.folder / "plan.json").write_text(json.dumps({"owners": owners, "model": "x" * 300}))
    memory = json.loads((run.folder / "memory.json").read_text())
    memory["owners"] = [{"owner": k, "predicted_bytes": v, "measured_bytes": v} for k, v in owners.items()]
    (run.folder / "memory.json").write_text(json.dumps(memory))
    return run


@pytest.fixture(scope="module")
def pages(run: Run) -> dict[int, Path]:
    """The page of the run, and of the run beside itself; plots take seconds."""
    return {runs: write_report([run.folder] * runs, run.folder / f"{runs}.html").html for runs in (1, 2)}


def test_an_error_on_a_page_would_be_heard(page: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text("<script>nosuch()</script><img src=missing.png>")
    page.open(tmp_path / "broken.html", 1280)
    assert len(page.console()) == 2


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("runs", [1, 2])
def test_the_page_fits_and_has_no_errors(
    run: Run, pages: dict[int, Path], page: Page, width: int, dark: bool, runs: int
) -> None:
    page.open(pages[runs], width, dark)
    assert page.console() == []
    assert page.ask("innerWidth") == width
    assert page.ask("document.documentElement.scrollWidth") <= width
    text = page.ask("document.body.innerText")
    for wanted in ("Loss", "Memory over the steps", "Memory through the blocks of a step", "Configuration"):
        assert wanted in text
    assert f"{run.summary['loss_after']:.4f}" in text
    shown = "[...document.querySelectorAll('figure svg')].filter(s => s.clientWidth > 0)"
    assert page.ask(f"{shown}.length") == page.ask("document.querySelectorAll('figure').length")
    scale = page.ask(f"Math.min(...{shown}.map(s => s.clientWidth / s.viewBox.baseVal.width))")
    assert 12 * scale >= SMALLEST_PIXELS
    background = page.ask("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 22, 26)") is dark


@pytest.mark.parametrize("width", [1280, 400])
def test_no_text_of_a_plot_leaves_it_or_covers_another(
    pages: dict[int, Path], page: Page, width: int
) -> None:
    page.open(pages[1], width)
    boxes = page.ask(
        "[...document.querySelectorAll('figure svg')].filter(s => s.clientWidth > 0).map(s => ["
        "s.getBoundingClientRect().toJSON(), [...s.querySelectorAll('text')].map("
        "t => ({...t.getBoundingClientRect().toJSON(), text: t.textContent}))])"
    )
    assert len(boxes) >= 7
    for frame, texts in boxes:
        for text in texts:
            assert text["left"] >= frame["left"] - 1, text
            assert text["right"] <= frame["right"] + 1, text
            assert text["bottom"] <= frame["bottom"] + 1, text
        for index, one in enumerate(texts):
            for other in texts[index + 1 :]:
                apart = one["right"] <= other["left"] + 1 or other["right"] <= one["left"] + 1
                above = one["bottom"] <= other["top"] + 3 or other["bottom"] <= one["top"] + 3
                assert apart or above, (one["text"], other["text"])


@pytest.mark.parametrize("width", [1280, 400])
def test_examples_leave_room_for_words(pages: dict[int, Path], page: Page, width: int) -> None:
    page.open(pages[1], width)
    cells = page.ask("[...document.querySelectorAll('.examples td')].map(c => c.clientWidth)")
    assert cells
    assert min(cells) >= 60  # a word of eight letters, where one of five once took three lines
