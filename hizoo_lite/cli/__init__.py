"""The command line: every command is a small module that parses, calls a typed function and prints.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 1 the run failed, 2 bad input (one message,
no traceback), 3 the memory budget cannot be met, 130 interrupted (state saved). Nothing here imports torch
before a command needs it.
"""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hizoo_lite import synonyms
from hizoo_lite.cli import (
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    methods,
    plan,
    profiles,
    quantize,
    recipes,
    replay,
    report,
    train,
)
from hizoo_lite.errors import BudgetError, ExportError, StorageError, TooManyBadSteps, UserError

FAILED, BAD_INPUT, NO_BUDGET = 1, 2, 3
#: What the system says if something cannot be stored.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class _Group(TyperGroup):
    """Turns errors that are meant for the user into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, RuntimeError) as error:
            codes = {
                BudgetError: NO_BUDGET,
                StorageError: FAILED,
                TooManyBadSteps: FAILED,
                ExportError: FAILED,
            }
            if not isinstance(error, (UserError, *codes)):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(codes.get(type(error), BAD_INPUT)) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            typer.echo(f"error: {where}{error.strerror}; make room there or choose another place", err=True)
            raise typer.Exit(FAILED) from error
        except Exception as error:
            if hasattr(error, "possibilities"):  # click's NoSuchOption, of which typer may have its own copy
                _suggest(error)
            raise


def _suggest(error: Any) -> None:
    """Have the message about an unknown flag name ours if it is what other tools call it."""
    known = [flag for option in error.ctx.command.params for flag in option.opts]
    meant = synonyms.meant(error.option_name, known)
    error.possibilities = None if meant is None else [meant]


app = typer.Typer(
    name="hizoo-lite",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hizoo-lite {version('hizoo-lite')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tune quantized language models where inference fits (HiZOO)."""


app.command("demo")(demo.command)
app.command("doctor")(doctor.command)
app.command("plan")(plan.command)
app.command("profiles")(profiles.command)
app.command("recipes")(recipes.command)
app.command("methods")(methods.command)
app.command("quantize")(quantize.command)
app.add_typer(data.app, name="data")
app.command("train")(train.command)
app.command("eval")(evaluate.command)
app.command("generate")(generate.command)
app.command("replay")(replay.command)
app.command("report")(report.command)
app.command("export")(export.command)


def main() -> None:
    """The console script `hizoo-lite`."""
    app(prog_name="hizoo-lite")
