"""`python -m hizoo_lite.edge`: the commands of a device, with neither torch nor typer.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted
(state saved, --resume goes on).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hizoo_lite.config import choices, help_of, kinds, members, settings
from hizoo_lite.edge import answer, train
from hizoo_lite.edge.model import OnnxModel
from hizoo_lite.errors import StorageError, TooManyBadSteps, UserError
from hizoo_lite.train import components, provenance
from hizoo_lite.train.config_file import flag, parsed
from hizoo_lite.train.evaluate import check_result
from hizoo_lite.train.folder import plain
from hizoo_lite.train.progress import Lines

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
#: Settings of an evaluation.
_EVAL_SETTINGS = ("task", "data", "max_length", "eval_batch_size", "seed", "threads")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.command(given))
    except (UserError, StorageError, TooManyBadSteps) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, UserError) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hizoo_lite.edge", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="tune the graph in a folder and write a run folder")
    command.add_argument("folder", metavar="DIR", type=Path, help="from hizoo-lite export --to onnx-train")
    command.add_argument("--json", action="store_true", help="print the summary")
    for name in train.SETTINGS:
        _add_setting(command, name)
    command.set_defaults(command=_train)
    command = commands.add_parser("eval", help="loss and metric of an exported model on a task, as JSON")
    command.add_argument("folder", metavar="DIR", type=Path, help="from hizoo-lite export --to onnx")
    command.add_argument("--adapter", help="its name in DIR, a run folder, or a PEFT adapter's")
    text = "default: test; all rows of a single file that --data names"
    command.add_argument("--split", choices=("train", "dev", "test", "all"), help=text)
    command.add_argument("--examples", type=int, help="evaluate this many at most")
    for name in _EVAL_SETTINGS:
        _add_setting(command, name)
    command.set_defaults(command=_eval)
    command = commands.add_parser("generate", help="continue a text with an exported causal model")
    command.add_argument("folder", metavar="DIR", type=Path, help="from hizoo-lite export --to onnx")
    command.add_argument("--prompt", required=True, help="a text, which is continued as it is")
    command.add_argument("--template", action="store_true", help="put the prompt into the chat template")
    command.add_argument("--adapter", help="its name in DIR, a run folder, or a PEFT adapter's")
    command.add_argument("--max-new-tokens", type=int, default=64)
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    command.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the mass")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(command=_generate)
    return parser


def _add_setting(command: argparse.ArgumentParser, name: str) -> None:
    """The flag of a setting, absent unless it is given; it is checked with the whole configuration."""
    kind, text = kinds()[name], help_of(name).replace("%", "%%")
    if bool in members(kind):
        command.add_argument(flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
    else:
        action = "append" if "several" in settings()[name].metadata else "store"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "action": action}
        command.add_argument(flag(name), metavar="|".join(choices(kind)) or "VALUE", **options)


def _train(given: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(given).items() if name in train.SETTINGS}
    config = train.resolve(given.folder, flags)
    folder, summary = train.train(given.folder, config, [Lines()])
    if given.json:
        print(json.dumps(plain(summary), indent=2))
    if summary["interrupted"]:
        print(f"interrupted; saved in {folder}; --resume --out {folder} goes on", file=sys.stderr)
        return INTERRUPTED
    print(f"saved in {folder} (adapter, adapter.onnx_adapter, summary.json)", file=sys.stderr)
    return 0


def _eval(given: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(given).items() if name in _EVAL_SETTINGS}
    config = answer.eval_config(given.folder, given.adapter, parsed(flags))
    task = components.task_of(config)
    part = components.which_part(given.split, config, task, names_data="data" in flags)
    if line := provenance.trained_on_line(given.adapter, config, part, given.split):
        print(line, file=sys.stderr)
    result = answer.evaluate_export(given.folder, given.adapter, config, part, given.examples, Lines())
    print(json.dumps(plain(result), indent=2))
    check_result(result)
    return 0


def _generate(given: argparse.Namespace) -> int:
    model = OnnxModel(given.folder, given.adapter)
    text = answer.continue_text(
        model,
        [{"role": "user", "content": given.prompt}] if given.template else given.prompt,
        given.max_new_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        seed=given.seed,
    )
    print(text if given.template else given.prompt + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
