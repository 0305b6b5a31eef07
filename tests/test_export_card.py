"""Model cards: what the Hub reads, how to prompt, and nothing of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hizoo_lite import tasks
from hizoo_lite.config import TrainConfig
from hizoo_lite.export import card
from hizoo_lite.export.peft import export
from hizoo_lite.run import Run, fit
from hizoo_lite.units import format_bytes
from tests.run_fixtures import short_run
from tests.test_cli import call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(TrainConfig(**short_run(tmp_path_factory.mktemp("tuned"), lr=0.1, bits="nf4")))


def written(run: Run, **changes: object) -> str:
    given = {
        "title": "Tuned",
        "about": "By a test.",
        "base": "org/model",
        "base_folder": run.folder,
        "kind": "causal",
        "library": "peft",
        "tags": "lora, tiny",
        "how": "Somehow.\n",
    }
    return card.write(run.folder, **{**given, **changes})  # type: ignore[arg-type]


def test_what_the_hub_reads_is_yaml_with_the_base_and_its_licence(run: Run, tmp_path: Path) -> None:
    head = yaml.safe_load(written(run).split("---")[1])
    assert head == {
        "base_model": "org/model",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "tiny"],
    }
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    head = yaml.safe_load(written(run, base="/a/folder", base_folder=tmp_path).split("---")[1])
    assert (head.get("base_model"), head["license"]) == (None, "apache-2.0")
    for text in ("no front matter", "---\nlicense: [a, b]\n---\n", "---\n: : :\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert card.licence(tmp_path) is None


def test_the_card_says_how_to_prompt_and_what_came_of_it_with_its_error_bar(run: Run) -> None:
    text = written(run)
    assert "```text\n{text} It was\n```" in text
    assert "```text\nA short text of your own. It was\n```" in text
    assert 'Answers: `" bad"`, `" good"`.' in text
    assert " held-out examples" in text or "±" in text
    assert "The day was" not in text  # a row of the data
    assert f"| peak memory of the run | {format_bytes(run.summary['measured_peak_bytes'])} |" in text


def test_every_target_says_it_in_one_line(run: Run, tmp_path: Path) -> None:
    done = call("export", str(run.folder), "--to", "merged", "--out", str(tmp_path / "out"))
    line = "prompt it as it was tuned: 'A short text of your own. It was' -> the likeliest of ' bad', ' good'"
    assert line in done.stderr.splitlines()
    assert "```text\n{text} It was\n```" in (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(MODEL)" in (tmp_path / "out" / "README.md").read_text()
    adapter = export(run.folder, tmp_path / "adapter")
    again = tmp_path / "again"
    said = call("export", str(adapter), "--to", "peft", "--out", str(again)).stderr
    assert said == f'try it: hizoo-lite generate --adapter {again} --prompt "..."\n'


@pytest.mark.parametrize(
    ("task", "kind", "template", "answers"),
    [
        ("sst2", "masked", "{text} It was {mask}.", ("terrible", "great")),
        ("rte", "classifier", "{premise} / {hypothesis}", ("entailment", "not_entailment")),
        ("squad", "causal", "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", ()),
        ("chat", "causal", "", ()),
    ],
)
def test_a_task_is_put_as_it_was_to_each_kind(task, kind, template, answers) -> None:
    found = card._prompting(tasks.get(task), kind)
    assert found is not None
    assert (found.template, found.answers) == (template, answers)


def test_a_text_that_is_continued_has_no_prompt() -> None:
    assert card._prompting(tasks.get("lm"), "causal") is None


def test_a_task_that_is_gone_leaves_the_card_without_a_prompt(run: Run, monkeypatch) -> None:
    monkeypatch.setattr(card.provenance.components, "find_task", lambda name: tasks.get("gone"))
    assert card.prompting(run.folder, "causal") == []
    assert "## Prompt it" not in written(run)
