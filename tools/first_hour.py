"""What a new user types in the first hour: data in every form, wrong names, a chat with the result.

    python tools/first_hour.py [--quick] [--json FILE] [--only TEXT]

Every case is a command in a process of its own, in a folder with generated data of the project's own, on the
embedded model. It is right if it ends with the wanted exit code and tells what is wanted; a refusal has in
addition to be told within `REFUSAL_SECONDS`. --quick: one case of each kind.

JSON: {"rows": [{"case", "ok", "seconds", "message"}], "timings"}. Exit code 1 if one is not ok.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from reporting import make_parser, publish

#: A refusal is told before torch is imported.
REFUSAL_SECONDS = 1.5
_SMALL = "--model embedded --steps 2 --batch-size 2 --max-length 96"
_SEVERAL = "--data alpaca.json --data messages.jsonl --task-weight 2 --task-weight 1"
_WORDS = ("soup", "film", "cake", "bread", "walk", "song", "lake", "tale", "road", "door")


@dataclass(frozen=True)
class Case:
    """A command (`hizoo-lite` in front, or a script of Python), what it tells and how it ends.

    given: standard input.
    """

    name: str
    command: str
    told: str
    code: int = 0
    given: str = ""

    @property
    def is_refusal(self) -> bool:
        """Whether it is to be told that something is wrong."""
        return self.code == 2


def rows() -> list[dict[str, str]]:
    """Forty questions with answers, and a class."""
    return [
        {
            "q": f"Is the {word} number {n} good?",
            "a": f"The {word} is fine.",
            "team": "odd" if n % 2 else "even",
        }
        for n, word in enumerate(_WORDS * 4)
    ]


def write_data(folder: Path) -> None:
    """A file of every form."""

    def lines(name: str, found: list[dict[str, object]]) -> None:
        (folder / name).write_text("\n".join(map(json.dumps, found)) + "\n", encoding="utf-8")

    made = rows()
    lines("alpaca.jsonl", [{"instruction": r["q"], "input": "", "output": r["a"]} for r in made])
    (folder / "alpaca.json").write_text(
        json.dumps([{"instruction": r["q"], "input": "in short", "output": r["a"]} for r in made])
    )
    lines(
        "sharegpt.jsonl",
        [
            {"conversations": [{"from": "human", "value": r["q"]}, {"from": "gpt", "value": r["a"]}]}
            for r in made
        ],
    )
    lines(
        "messages.jsonl",
        [
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": r["q"]}]},
                    {"role": "assistant", "content": r["a"]},
                ]
            }
            for r in made
        ],
    )
    lines("completion.jsonl", [{"prompt": r["q"], "completion": f" {r['a']}"} for r in made])
    lines(
        "bad.jsonl",
        [*({"instruction": r["q"], "output": r["a"]} for r in made), {"instruction": "x", "output": ""}],
    )
    for name, delimiter, encoding in (("tickets.csv", ",", "utf-8-sig"), ("tickets-de.csv", ";", "cp1252")):
        with (folder / name).open("w", newline="", encoding=encoding) as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(["text", "team"])
            table.writerows([f"Grüße: {r['q']}", r["team"]] for r in made)
    (folder / "plain.txt").write_text("\n\n".join(f"{r['q']} {r['a']}" for r in made * 8), encoding="utf-8")
    with (folder / "nameless.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([r["q"], r["team"]] for r in made)
    table = pa.table({name: [r[name] for r in made] for name in ("q", "team")})
    parquet.write_table(table, folder / "table.parquet")
    with pa.OSFile(str(folder / "table.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    lines(
        "turns.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": r["q"]}],
                "completion": [{"role": "assistant", "content": r["a"]}],
            }
            for r in made
        ],
    )
    (folder / "own.py").write_text(SCRIPT)
    (folder / "parts").mkdir()
    for part, count in (("train", 30), ("valid", 5), ("test", 5)):
        lines(f"parts/{part}.jsonl", [{"text": r["q"], "label": r["team"]} for r in made[:count]])
    (folder / "settings.yaml").write_text(
        "model: embedded\ndata: tickets.csv\nsteps: 2\nlr: 1e-2\nbalanced: off\n"
    )
    (folder / "rewards.py").write_text("def brevity(example, text):\n    return -len(text)\n")
    (folder / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')


#: What a user of Python writes.
SCRIPT = """
import hizoo_lite as hz

rows = [{"text": f"Soup {n}", "label": "good" if n % 2 else "bad"} for n in range(20)]
model = hz.load("embedded")
run = hz.fit(model, data=rows, steps=2, batch_size=2, r=4, lora_alpha=8, out="runs/python", progress=False)
print(run, run.history[-1]["kind"], hz.evaluate(run).examples)
run.save_pretrained("python-adapter")
"""
#: Name | what is told | command. SMALL is a short run of the embedded model, SEVERAL are files; what is
#: called "no:" is refused.
CASES = """
rows that cannot be used are listed | left out | train SMALL --data bad.jsonl --out runs/bad
no: or refused | bad.jsonl:41 | train SMALL --data bad.jsonl --strict --out runs/strict
no: broken JSON | broken.jsonl:2 | train SMALL --data broken.jsonl
epochs | saved in | train --model embedded --data tickets.csv --epochs 1 --batch-size 20 --out runs/epochs
settings in YAML | saved in | train --config settings.yaml --batch-size 2 --out runs/yaml
a recipe | saved in | train --config exact SMALL --data tickets.csv --exact-blocks 2 --out runs/exact
recipes | Your own classes | recipes
machines | rtx4090-24gb | profiles
the version | hizoo-lite 0 | --version
several sources with weights | messages, messages: 40 | train SMALL SEVERAL --out runs/mixed
Python | eval 2 | own.py
further from an adapter | saved in | train SMALL --data tickets.csv --init-adapter runs/exact --out runs/more
an objective of one's own | saved in | train SMALL --data completion.jsonl --objective rewards.py:brevity
a question | | generate --adapter runs/alpaca-jsonl --prompt Hello --max-new-tokens 4
a question from standard input | The soup | generate --model embedded --max-new-tokens 4 < The soup
a conversation | | generate --adapter runs/messages-jsonl --chat --max-new-tokens 4 < Hello/Again/
a base model with a template | saved in | train SMALL --data alpaca.jsonl --chat-template chatml --out runs/b
a report | report.html | report runs/exact
an adapter for PEFT | PEFT adapter | export runs/exact --to peft --out peft
an adapter for llama.cpp | adapter.gguf | export runs/exact --to gguf --out gguf
a merged model for onnxruntime | try it: hizoo-lite generate --onnx | export runs/exact --to onnx --out onnx
an answer of the export | | generate --onnx onnx --prompt Hello --max-new-tokens 4
resumed | saved in | train --resume --out runs/exact
no: a wrong task | unknown name 'nope' | train --model embedded --task nope
no: no such data | nowhere.csv | train --model embedded --data nowhere.csv
no: a data set of the hub, offline | org/name | train --model embedded --data org/name
no: weights of one source | --task-weight | train --model embedded --data tickets.csv --task-weight 2
no: a folder that is used | holds a run already | train --model embedded --data tickets.csv --out runs/exact
no: no such tracker | clearml is not installed | train --model embedded --data tickets.csv --tracker clearml
no: no such model | no/one is not a local folder | train --model no/one --data tickets.csv
no: a name of another tool | --lr | train --learning-rate 1
no: no such adapter | nowhere | generate --adapter nowhere --prompt a
"""
#: Of each file of data: how what was understood begins.
FORMS = {
    "alpaca.jsonl": "alpaca: 40",
    "alpaca.json": "alpaca: 40",
    "sharegpt.jsonl": "sharegpt: 40",
    "messages.jsonl": "messages: 40",
    "completion.jsonl": "completion: 40",
    "plain.txt": "text:",
    "tickets.csv": "classification: 40",
    "tickets-de.csv": "classification: 40",
    "parts": "classification:",
    "nameless.csv": "classification: 40",
    "table.parquet": "classification: 40",
    "table.arrow": "classification: 40",
    "turns.jsonl": "completion: 40",
}


def cases() -> Iterator[Case]:
    """In the order in which they are run: later ones use what earlier ones have made."""
    for name, form in FORMS.items():
        yield Case(f"inspect {name}", f"data inspect {name}", form)
        out = name.replace(".", "-")
        yield Case(f"train {name}", f"train {_SMALL} --data {name} --out runs/{out}", "saved in")
    for line in CASES.strip().splitlines():
        name, told, command = (part.strip() for part in line.split("|", 2))
        command, _, given = command.replace("SMALL", _SMALL).replace("SEVERAL", _SEVERAL).partition(" < ")
        code = 2 if name.startswith("no: ") else 0
        yield Case(name.removeprefix("no: "), command, told, code, given.replace("/", "\n") + "\n")


def run(case: Case, folder: Path) -> dict[str, object]:
    """The case's row."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HIZOO_LITE_REPORT": "0", "COLUMNS": "200"}
    words = case.command.split()
    command = [sys.executable, *([] if words[0].endswith(".py") else ["-m", "hizoo_lite.cli"]), *words]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=offline, capture_output=True, text=True, input=case.given, timeout=600
    )
    seconds = time.perf_counter() - began
    told = done.stdout + done.stderr
    ok = done.returncode == case.code and case.told in told
    if case.is_refusal:
        ok = ok and seconds <= REFUSAL_SECONDS
    lines = [line for line in told.splitlines() if line.strip()]
    shown = next((line for line in lines if case.told and case.told in line), lines[-1] if lines else "")
    return {"case": case.name, "ok": ok, "seconds": seconds, "message": shown.strip()[:160]}


def main() -> None:
    """Run the cases and show what came of them."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this text")
    arguments = parser.parse_args()
    wanted = [case for case in cases() if arguments.only in case.name]
    if arguments.quick:
        names = (
            "inspect alpaca.jsonl",
            "train alpaca.jsonl",
            "a question",
            "a wrong task",
            "a name of another tool",
        )
        wanted = [case for case in wanted if case.name in names]
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        for case in wanted:
            found.append(run(case, folder))
            row = found[-1]
            print(
                f"{'ok ' if row['ok'] else 'NOT'} {row['seconds']:6.1f} s  {case.name}: {row['message']}",
                flush=True,
            )
    refused = [row["seconds"] for row, case in zip(found, wanted, strict=True) if case.is_refusal]
    timings = {"slowest_refusal": max(refused, default=None), "all": sum(row["seconds"] for row in found)}
    columns = ["case", "ok", "seconds", "message"]
    table = [[row[column] for column in columns] for row in found]
    publish("The first hour", columns, table, {"rows": found, "timings": timings}, arguments)
    sys.exit(not all(row["ok"] for row in found))


if __name__ == "__main__":
    main()
