"""The commands that mend, slim and join checkpoints: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.terminal import CHECKPOINT, JSON, RUN, facts_as_json, progress

if TYPE_CHECKING:
    from ckpt.runs.run import Run


@click.command()
@RUN
@click.option("--fix", is_flag=True, help="Put right what can be.")
@click.option(
    "--adopt",
    is_flag=True,
    help="Commit whole checkpoints that were written without ckpt; nothing else is done.",
)
@JSON
def doctor(run: Path, fix: bool, adopt: bool, as_json: bool) -> None:
    """Find what a crash left: pointers that lead nowhere, leftovers, torn folders.

    With --fix pointers are rewritten, leftovers of saves, conversions and deletions that nobody
    works on are removed, and folders that no resume could read are renamed to .NAME.torn. Exit
    code 1 if anything is left to put right.

    \b
    ckpt doctor out
    ckpt doctor out --fix
    ckpt doctor out --adopt
    """
    from ckpt.runs import doctor as mending
    from ckpt.runs.run import Run

    if fix and adopt:
        raise click.UsageError("--adopt and --fix are two steps; adopt first.")
    if adopt:
        _adopt(Run(run), as_json)
        return
    done, left = mending.mend(Run(run)) if fix else ([], mending.diagnose(Run(run)))
    if as_json:
        entries = [
            {"path": str(f.path), "what": f.what, "remedy": f.remedy, "mended": mended}
            for found, mended in ((done, True), (left, False))
            for f in found
        ]
        click.echo(facts_as_json(entries))
    else:
        for f in done:
            click.echo(f"mended\t{f.path}: {f.what}; --fix: {f.remedy}")
        for f in left:
            remedy = f"; --fix: {f.remedy}" if f.remedy else ""
            click.echo(f"found\t{f.path}: {f.what}{remedy}")
        if not done and not left:
            click.echo(f"ckpt: {run}: nothing to mend", err=True)
    if left:
        sys.exit(1)


def _adopt(run: Run, as_json: bool) -> None:
    from ckpt.runs import adoption

    found = adoption.adopt(run)
    if as_json:
        entries = [
            {"folder": str(c.folder), "adopted": why is None, "why": why} for c, why in found
        ]
        click.echo(facts_as_json(entries))
    else:
        for checkpoint, why in found:
            said = f"not adopted\t{why}" if why else f"adopted\t{checkpoint.folder}"
            click.echo(said)
        if not found:
            click.echo(f"ckpt: {run.path}: every checkpoint has its manifest", err=True)
    if any(why is not None for _, why in found):
        sys.exit(1)


@click.command()
@CHECKPOINT
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--force", is_flag=True, help="Even the newest full one, or a pinned one.")
@JSON
def slim(checkpoint: Path, dry_run: bool, force: bool, as_json: bool) -> None:
    """Make a full checkpoint a weights-only one.

    The weights beside DeepSpeed's files are proven complete first: every name and shape, every
    byte by its digest. Training cannot go on from a weights-only checkpoint.

    \b
    ckpt slim out/checkpoint-500 --dry-run
    ckpt slim out/checkpoint-500
    """
    from ckpt.report import size
    from ckpt.runs import slim as slimming
    from ckpt.runs.run import require_checkpoint

    made = slimming.plan(require_checkpoint(checkpoint), force)
    if not dry_run:
        slimming.execute(made)
    if as_json:
        held = {"folder": str(checkpoint), "dry_run": dry_run, "proven": made.proven}
        click.echo(facts_as_json(held | {"removed": list(made.removed), "nbytes": made.nbytes}))
        return
    for name in made.removed:
        click.echo(f"{'would remove' if dry_run else 'removed'}\t{checkpoint / name}")
    click.echo(f"ckpt: {made.proven}; {size(made.nbytes)}", err=True)


@click.command()
@click.argument(
    "folders", metavar="NODE_FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A new folder, or one of the NODE_FOLDERs, to which the other files are added.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be copied, and copy nothing.")
@JSON
def collect(folders: tuple[Path, ...], output: Path, dry_run: bool, as_json: bool) -> None:
    """Join the parts of a checkpoint that lie on several nodes.

    Each NODE_FOLDER is a node's part of the same save. Every byte is verified, and the output
    appears all at once.

    \b
    ckpt collect node0/checkpoint-500 node1/checkpoint-500 -o out/checkpoint-500
    """
    from ckpt.report import size
    from ckpt.runs import collect as collecting

    made = collecting.plan(folders, output)
    if not dry_run:
        with progress(made.nbytes, output.name) as moved:
            collecting.execute(made, moved)
    if as_json:
        held = {"output": str(output), "dry_run": dry_run, "nbytes": made.nbytes}
        sources = {name: str(folder / name) for name, folder in made.files.items()}
        click.echo(facts_as_json(held | {"files": sources}))
        return
    click.echo(output)
    said = "would be copied" if dry_run else "copied and verified"
    click.echo(f"ckpt: {len(made.files)} files, {size(made.nbytes)} {said}", err=True)


COMMANDS = (doctor, slim, collect)
