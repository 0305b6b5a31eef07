"""The report of a run, or of two beside each other: one HTML file that needs nothing else, a PNG, a JSON.

A run has it drawn at its end in a process of its own (`hizoo-lite report`), so that matplotlib never counts
in the run's memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from hizoo_lite.errors import UserError
from hizoo_lite.report import draw, examples, headline, verdict
from hizoo_lite.report.charts import Chart, make_charts
from hizoo_lite.report.record import RunRecord, number, read_run

_TEMPLATE = "report.html.j2"


class Written(NamedTuple):
    """The files of a report."""

    html: Path
    json: Path
    png: Path


def write_report(runs: Sequence[Path | str], out: Path | str | None = None) -> Written:
    """Write the report of one run folder, or of two compared.

    out: the HTML file; without it RUN/report.html, of two runs RUN/report-with-RUN2.html. PNG and JSON go
    beside it. Raises UserError if a run cannot be read or the report not be written.
    """
    records = [read_run(path) for path in runs]
    page = Path(out) if out is not None else default_page(records)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: got {str(page)!r}, allowed: a file name that ends in .html")
    charts = make_charts(records)
    written = Written(page, page.with_suffix(".json"), page.with_suffix(".png"))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        _write(written.html, render(records, charts))
        text = json.dumps(as_json(records), indent=2, allow_nan=False, ensure_ascii=False)
        _write(written.json, text + "\n")
        categories = dict(zip(headline.labels(records), map(headline.categories, records), strict=True))
        draw.png(charts, categories, _title(records), written.png)
    except OSError as error:
        raise UserError(f"--out: {page} cannot be written ({error.strerror or error})") from error
    return written


def _write(path: Path, text: str) -> None:
    """A half of a surrogate pair, which JSON can bring in and UTF-8 cannot hold, becomes a question mark."""
    path.write_text(text, encoding="utf-8", errors="replace")


def default_page(records: Sequence[RunRecord]) -> Path:
    """Where the report of these runs goes by itself."""
    names = [record.name for record in records[1:]]
    return records[0].path / ("report.html" if not names else f"report-with-{names[0]}.html")


def as_json(records: Sequence[RunRecord]) -> dict[str, Any]:
    """report.json: for each run name, headline figures, owners, summary and what is missing."""
    runs = [
        {
            "name": name,
            "headline": headline.headline(record),
            "metric": headline.metric_name(record),
            "owners": [_category(found) for found in headline.categories(record)],
            "summary": _plain(record.summary),
            "memory": _plain({k: v for k, v in record.memory.items() if k not in ("samples", "owners")}),
            "configuration": _plain(record.config),
            "missing": record.missing,
            "verdict": None if (said := verdict.of_run(record)) is None else said._asdict(),
        }
        for name, record in zip(headline.labels(records), records, strict=True)
    ]
    return {"runs": runs, **({"differences": _differences(records)} if len(records) > 1 else {})}


def _category(found: headline.Category) -> dict[str, Any]:
    named = {"owner": found.name, "predicted_bytes": found.predicted_bytes}
    return {**named, "measured_bytes": found.measured_bytes}


def _differences(records: Sequence[RunRecord]) -> dict[str, float | None]:
    """Second minus first of every headline figure that both have."""
    first, second = map(headline.headline, records)
    pairs = {key: (first[key], second[key]) for key in first}
    return {key: b - a for key, (a, b) in pairs.items() if a is not None and b is not None}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity, and TOML has dates."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return number(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def _title(records: Sequence[RunRecord]) -> str:
    return " and ".join(headline.labels(records))


def render(records: Sequence[RunRecord], charts: Sequence[Chart]) -> str:
    names = headline.labels(records)
    sizes = {"wide": draw.WIDE, "narrow": draw.NARROW}  # matplotlib escapes the text in an <svg>
    drawn = [
        {"chart": chart, **{name: Markup(draw.svg(chart, size)) for name, size in sizes.items()}}
        for chart in charts
    ]
    return _template().render(
        title=_title(records),
        runs=list(zip(names, records, strict=True)),
        drawn=drawn,
        cards=headline.cards(records[0]) if len(records) == 1 else [],
        compared=headline.compared(*records) if len(records) > 1 else [],
        categories=list(zip(names, map(headline.categories, records), strict=True)),
        tables=headline.tables(records),
        verdicts=[
            (name, said) for name, run in zip(names, records, strict=True) if (said := verdict.of_run(run))
        ],
        commands=verdict.commands(records[0].path, records[0].summary) if len(records) == 1 else {},
        groups=examples.groups(records[0]) if len(records) == 1 else [],
        confusion=examples.confusion(records[0]) if len(records) == 1 else None,
        notes=_notes(records),
        show=headline.show,
        about=headline.about,
    )


def _notes(records: Sequence[RunRecord]) -> list[str]:
    """What a reader should know about how the memory figures came about."""
    found = []
    for name, record in zip(headline.labels(records), records, strict=True):
        share = number(record.memory.get("sampling_share"))
        if share is not None:
            every = number(record.memory.get("every_steps")) or 1
            steps = "every step" if every == 1 else f"the first steps and every {every:.0f}th"
            found.append(
                f"{name}: memory was sampled at the block boundaries of {steps}; "
                f"that took {100 * share:.2f} % of the steps' time. Peaks come from "
                f"{_SOURCES.get(str(record.memory.get('peak_from')), 'an unknown source')}."
            )
    return found


_SOURCES = {
    "kernel": "the kernel's high-water mark of the whole process, libraries included",
    "allocator": "torch's CUDA allocator, without the CUDA context",
    "samples": "a thread that looked every ten milliseconds; a shorter peak is missed",
}


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(_TEMPLATE)
