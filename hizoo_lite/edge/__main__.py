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

from hizoo_lite.edge import train
from hizoo_lite.errors import StorageError, TooManyBadSteps, UserError
from hizoo_lite.train.config import choices, kinds, members, settings
from hizoo_lite.train.config_file import flag
from hizoo_lite.train.folder import plain
from hizoo_lite.train.watch import Lines

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


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
    return parser


def _add_setting(command: argparse.ArgumentParser, name: str) -> None:
    """The flag of a setting, absent unless it is given; it is checked with the whole configuration."""
    kind, text = kinds()[name], settings()[name].metadata["help"].replace("%", "%%")
    if bool in members(kind):
        command.add_argument(flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
    else:
        metavar = "|".join(choices(kind)) or "VALUE"
        command.add_argument(flag(name), default=argparse.SUPPRESS, help=text, metavar=metavar)


def _train(given: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(given).items() if name in train.SETTINGS}
    config = train.resolve(given.folder, flags)
    folder, summary = train.train(given.folder, config, Lines())
    if given.json:
        print(json.dumps(plain(summary), indent=2))
    if summary["interrupted"]:
        print(f"interrupted; saved in {folder}; --resume --out {folder} goes on", file=sys.stderr)
        return INTERRUPTED
    print(f"saved in {folder} (adapter, adapter.onnx_adapter, summary.json)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
