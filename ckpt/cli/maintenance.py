"""The commands that slim and join checkpoints: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.doctor import doctor
from ckpt.cli.options import JSON, LOCAL_CHECKPOINT, LOCAL_PATH, OUTPUT_PATH
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output, Planned, Progress
from ckpt.cli.usage.command import Command
from converters.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.results import FileEntry
    from ckpt.runs.run import RunCheckpoint
    from ckpt.runs.upkeep.collect import Collection
    from ckpt.runs.upkeep.slim import Slimming


_OPTIONS_OF_SLIM = {"dtype": ("fp32",), "names": ("reader", "hf"), "force": ()}


@click.command(cls=Command, short_help="Keep the weights of a checkpoint, and remove its states.")
@LOCAL_CHECKPOINT
@dry_run_option("Say what would be removed, and remove nothing.")
@click.option(
    "--force", is_flag=True, help="Slim the newest full checkpoint, or a pinned one, too."
)
@click.option(
    "--dtype",
    type=click.Choice(_OPTIONS_OF_SLIM["dtype"]),
    help="Keep fp32 weights, made of the states, in place of the 16-bit ones.",
)
@click.option(
    "--names",
    type=click.Choice(_OPTIONS_OF_SLIM["names"]),
    help="With --dtype: the names that the model's reader knows (default), or those of "
    "transformers for the names of a pipeline, of Megatron or of AutoEP.",
)
@JSON
def slim(
    checkpoint: Path,
    dry_run: bool,
    force: bool,
    dtype: str | None,
    names: str | None,
    as_json: bool,
) -> None:
    """Keep the weights of a checkpoint, and remove its states.

    The weights beside DeepSpeed's files are proven first: they have every name and shape
    of the states, every byte agrees with its digest, and every value is that of the
    states, rounded. They are 16-bit ones as a rule, and the fp32 masters go with the
    optimizer state; --dtype fp32 writes fp32 weights first. Training cannot go on from a
    weights-only checkpoint.

    \b
    ckpt slim out/checkpoint-500 --dry-run
    ckpt slim out/checkpoint-500
    ckpt slim out/checkpoint-500 --dtype fp32
    """
    from ckpt.runs import user_paths
    from converters import options

    if names is not None and dtype is None:
        raise click.UsageError("--names is for the weights that --dtype fp32 makes; add it.")

    run_checkpoint = user_paths.checkpoint_at(checkpoint, "ckpt slim")
    user_paths.require_deepspeed(run_checkpoint)
    with options.using(options.of_command(_OPTIONS_OF_SLIM), overrides=True):
        if dtype is None:
            work = _slim(run_checkpoint, force)
        else:
            work = _slim_to_fp32(run_checkpoint, force, names or "reader")
        planned.run(work, dry_run=dry_run, as_json=as_json)


def _slim(checkpoint: RunCheckpoint, force: bool) -> Planned:
    from ckpt.runs.upkeep import slim as slimming

    with planned.progress(slimming.proof_bytes(checkpoint), checkpoint.name) as advance:
        slimming_plan = slimming.plan(checkpoint, force, advance)
    is_newest = slimming.is_newest(checkpoint)

    def execute(_: Progress) -> Output:
        slimming.execute(slimming_plan)
        return _slimmed(slimming_plan, is_newest, dry_run=False)

    return Planned(
        preview=lambda: _slimmed(slimming_plan, is_newest, dry_run=True), execute=execute
    )


def _loss_of_newest(folder: Path, dry_run: bool) -> str:
    """A line where the newest is slimmed, from which a job would go on."""
    from converters.words import shell_word

    was, could = ("is", "can") if dry_run else ("was", "could")
    return (
        f"ckpt: {folder.name} {was} the newest committed one that training {could} go on from: "
        "without its states a job that starts again takes another one, or stops if there is none "
        f"(ckpt latest {shell_word(folder.parent)} says which)"
    )


def _slim_to_fp32(checkpoint: RunCheckpoint, force: bool, names: str) -> Planned:
    from ckpt.runs.upkeep import slim as slimming
    from ckpt.weights.conversion import fp32_slimming

    plan = fp32_slimming.plan(checkpoint, force, names)
    is_newest = slimming.is_newest(checkpoint)

    def execute(progress: Progress) -> Output:
        fp32_slimming.execute(plan, progress)
        return _slimmed(plan.slimming, is_newest, plan.files, dry_run=False)

    return Planned(
        preview=lambda: _slimmed(plan.slimming, is_newest, plan.files, dry_run=True),
        execute=execute,
        nbytes=plan.nbytes,
        title=checkpoint.name,
    )


def _slimmed(
    slimming: Slimming,
    is_newest: bool,
    files: Sequence[FileEntry] = (),
    *,
    dry_run: bool,
) -> Output:
    from ckpt.cli.results.upkeep import SlimResult
    from ckpt.text import size

    folder = slimming.checkpoint.folder
    removal = "would remove" if dry_run else "removed"
    creation = "would write" if dry_run else "wrote"
    freeing = "would be freed" if dry_run else "freed"
    notices = [f"ckpt: {'; '.join(slimming.proven)}; {size(slimming.nbytes)} {freeing}"]
    dtypes = ", ".join(slimming.dtypes)
    if set(slimming.dtypes) - {"F32"} and dry_run:
        notices.append(
            "ckpt: the fp32 masters go with the optimizer state; the weights that stay are "
            f"{dtypes}; --dtype fp32 keeps fp32 weights"
        )
    elif set(slimming.dtypes) - {"F32"}:
        notices.append(
            f"ckpt: the fp32 masters went with the optimizer state; the weights here are {dtypes}"
        )

    if is_newest:
        notices.append(_loss_of_newest(folder, dry_run))

    return Output(
        SlimResult(
            dry_run=dry_run,
            path=folder,
            dtypes=slimming.dtypes,
            files=tuple(files),
            proven=slimming.proven,
            deleted=slimming.removed,
            nbytes=slimming.nbytes,
        ),
        [
            *(f"{creation}\t{folder / file.name}" for file in files),
            *(f"{removal}\t{folder / name}" for name in slimming.removed),
        ],
        notices,
    )


@click.command(cls=Command, short_help="Join the parts of a checkpoint of several nodes.")
@click.argument(
    "folders",
    metavar="NODE_FOLDER...",
    nargs=-1,
    required=True,
    type=LOCAL_PATH,
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=OUTPUT_PATH,
    help="A new folder, or one of the NODE_FOLDERs, to which the other files are added.",
)
@dry_run_option("Say what would be copied, and copy nothing.")
@JSON
def collect(folders: tuple[Path, ...], output: Path, dry_run: bool, as_json: bool) -> None:
    """Join the parts of a checkpoint that lie on several nodes.

    Each NODE_FOLDER is a node's part of the same save. Every byte is verified, and the
    output appears all at once.

    \b
    ckpt collect node0/checkpoint-500 node1/checkpoint-500 -o out/checkpoint-500
    """
    from ckpt.runs.upkeep import collect as collecting

    collection = collecting.plan(folders, output)

    def preview() -> Output:
        collecting.require_output(collection)
        return _collected(collection, dry_run=True)

    def execute(progress: Progress) -> Output:
        collecting.execute(collection, progress)
        return _collected(collection, dry_run=False)

    planned.run(
        Planned(
            preview=preview,
            execute=execute,
            nbytes=collection.nbytes,
            title=output.name,
            interruption=lambda: None if collection.inside else planned.interruption(None),
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _collected(collection: Collection, dry_run: bool) -> Output:
    from ckpt.cli.results.upkeep import CollectResult
    from ckpt.text import size

    outcome = "would be copied" if dry_run else "copied and verified"
    files = counted(len(collection.files), "file")
    return Output(
        CollectResult(
            dry_run=dry_run,
            output=collection.output,
            nbytes=collection.nbytes,
            sources={name: folder / name for name, folder in collection.files.items()},
        ),
        [collection.output],
        [f"ckpt: {files}, {size(collection.nbytes)} {outcome}"],
    )


COMMANDS = (doctor, slim, collect)
