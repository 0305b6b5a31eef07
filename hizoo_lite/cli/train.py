"""`hizoo-lite train`: a run from flags, a TOML file, or both."""

from __future__ import annotations

from typing import Annotated

import typer

from hizoo_lite.cli.options import with_settings

INTERRUPTED = 130


def train(
    settings: dict[str, str | bool],
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE|RECIPE", help="TOML or YAML file, or one of `hizoo-lite recipes`"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the summary as JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Tune a model and write a run folder.

    Flags override the file, both override a machine's --profile. Ctrl-C ends the run after the step in
    progress, with everything saved.

    Examples:

    hizoo-lite train --model models/opt-125m --task sst2 --data data/sst2 --out runs/sst2

    hizoo-lite train --config sst2-lora --model models/opt-125m --data data/sst2 --steps 2000

    hizoo-lite train --model models/opt-1.3b --task sst2 --data data/sst2 --profile rtx4060ti-16gb

    hizoo-lite train --config demo --objective accuracy --out runs/accuracy

    hizoo-lite train --resume --out runs/sst2

    torchrun --nproc-per-node 4 -m hizoo_lite.cli train --config sst2-lora --model models/opt-125m
    """
    from hizoo_lite.train import preflight
    from hizoo_lite.train.config_file import resolve

    resolved = resolve(config, settings)
    preflight.check(resolved)
    from hizoo_lite.cli import output, progress

    output.say_loading()
    from hizoo_lite.run import fit

    run = fit(resolved, callbacks=[progress.display(quiet)])
    if not run.setup.stepper.ranks.is_main:
        raise typer.Exit(INTERRUPTED if run.interrupted else 0)
    if json:
        output.print_json(run.summary)
    else:
        output.print_run(run.summary)
        output.print_verdict(run.folder)
    place = f"{run.folder} (adapter, summary.json, metrics.jsonl)"
    if run.interrupted:
        typer.echo(f"interrupted; saved in {place}; go on with: {resume_line(str(run.folder))}", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"saved in {place}", err=True)
    output.print_commands(run.folder, run.summary)


def resume_line(folder: str) -> str:
    """The command that continues a run."""
    quoted = f'"{folder}"' if " " in folder else folder
    return f"hizoo-lite train --resume --out {quoted}"


command = with_settings(train)
