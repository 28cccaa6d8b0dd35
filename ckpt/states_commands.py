"""The commands that write training states anew: ``reshard``, ``to-universal``, ``from-universal``.

They parse, call and print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ckpt.terminal import CHECKPOINT, JSON, TAG, facts_as_json, progress

_SHARED = (
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option(
        "--no-verify",
        is_flag=True,
        help="Skip the CRC32s of what is read. Every element's place is proven anyway.",
    ),
    click.option(
        "--read-back",
        is_flag=True,
        help="Read the finished files once more and compare CRC32s: for disks that are not "
        "trusted.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an output folder that exists."),
    click.option("--workers", type=click.IntRange(1, 64), help="Threads that move bytes."),
    JSON,
)


_NATIVE = (
    click.option(
        "--world-size",
        metavar="RANKS",
        type=click.IntRange(1),
        required=True,
        help="The ranks (GPUs) that will resume.",
    ),
    click.option(
        "--stage", type=click.IntRange(1, 3), help="The ZeRO stage. Default: that of the run."
    ),
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Default: CHECKPOINT-wRANKS."
    ),
    click.option(
        "--sub-group-size",
        metavar="ELEMENTS",
        type=click.IntRange(1),
        help="Of the engine that will resume with stage 3. Default: what the run was configured "
        "with.",
    ),
    click.option(
        "--zero-init/--no-zero-init",
        default=None,
        help="Muon, from stage 1 or 2 to 3: whether the model will be made under "
        "deepspeed.zero.Init, as the Trainer makes it.",
    ),
)


def _with(
    options: Sequence[Callable[..., Any]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Several options as one decorator; they are listed in this order."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


@click.command()
@CHECKPOINT
@_with(_NATIVE)
@TAG
@_with(_SHARED)
def reshard(
    checkpoint: Path,
    world_size: int,
    stage: int | None,
    output: Path | None,
    tag: str | None,
    sub_group_size: int | None,
    zero_init: bool | None,
    **options: Any,
) -> None:
    """Rewrite a ZeRO checkpoint for another number of ranks, or another stage.

    The output holds DeepSpeed's own files: engine.load_checkpoint, and the Trainer's
    resume_from_checkpoint, load it as they load any. Weights, every optimizer state, steps, loss
    scale, scheduler and client state are those of CHECKPOINT, bit for bit.

    \b
    ckpt reshard out/checkpoint-500 --world-size 3
    ckpt reshard out/checkpoint-500 --world-size 8 --stage 3 -o resume/checkpoint-500
    ckpt reshard out/checkpoint-500 --world-size 3 --dry-run
    """
    from ckpt import reshard as resharding

    planned = resharding.prepare(
        checkpoint,
        world_size,
        stage=stage,
        output=output,
        tag=tag,
        sub_group_size=sub_group_size,
        zero_init=zero_init,
    )
    _rewrite(planned, **options)


@click.command("to-universal")
@CHECKPOINT
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Default: CHECKPOINT_universal."
)
@TAG
@_with(_SHARED)
def to_universal(checkpoint: Path, output: Path | None, tag: str | None, **options: Any) -> None:
    """Write a ZeRO checkpoint in DeepSpeed's universal format.

    The output is loaded on any number of ranks by a stock engine of stage 1, 2 or 3 that has
    "checkpoint": {"load_universal": true} in its configuration. ckpt reshard makes files that load
    without it.

    \b
    ckpt to-universal out/checkpoint-500
    ckpt to-universal out/checkpoint-500 --dry-run
    """
    from ckpt import universal

    _rewrite(universal.prepare_to(checkpoint, output=output, tag=tag), **options)


@click.command("from-universal")
@CHECKPOINT
@_with(_NATIVE)
@click.option("--tag", help="The tag to read. Default: what the file latest_universal names.")
@click.option(
    "--like",
    metavar="CHECKPOINT",
    type=click.Path(path_type=Path),
    help="A native checkpoint of the same model, where the folder does not tell the order of the "
    "parameters.",
)
@_with(_SHARED)
def from_universal(
    checkpoint: Path,
    world_size: int,
    stage: int | None,
    output: Path | None,
    tag: str | None,
    like: Path | None,
    sub_group_size: int | None,
    zero_init: bool | None,
    **options: Any,
) -> None:
    """Write DeepSpeed's native files from a universal folder, whoever made it.

    The output is loaded by plain engine.load_checkpoint, and by the Trainer.

    \b
    ckpt from-universal out/checkpoint-500_universal --world-size 3
    ckpt from-universal out/checkpoint-500_universal --world-size 8 --stage 3 -o resume
    """
    from ckpt import universal

    planned = universal.prepare_from(
        checkpoint,
        world_size,
        stage=stage,
        output=output,
        tag=tag,
        like=like,
        sub_group_size=sub_group_size,
        zero_init=zero_init,
    )
    _rewrite(planned, **options)


def _rewrite(
    planned: Any,
    dry_run: bool,
    no_verify: bool,
    read_back: bool,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Prints what would be done, or does it and prints that."""
    from ckpt import rewriting
    from ckpt.report import size

    if dry_run:
        facts = rewriting.describe(planned)
        click.echo(facts_as_json(facts) if as_json else _dry_run(facts, size))
        return
    with progress(planned.plan.nbytes, planned.output.name) as moved:
        facts = rewriting.run(
            planned,
            verify=not no_verify,
            read_back=read_back,
            overwrite=overwrite,
            workers=workers,
            progress=moved,
        )
    if as_json:
        click.echo(facts_as_json(facts))
        return
    click.echo(planned.output)
    click.echo(_proven(facts["checks"], size))
    for note in facts["notes"]:
        click.echo(f"note: {note}", err=True)


def _dry_run(facts: dict[str, Any], size: Any) -> str:
    lines = [f"{facts['output']}/{file['name']}\t{size(file['size'])}" for file in facts["files"]]
    lines += [f"{facts['output']}/{name}\tcopied" for name in sorted(facts["copied"])]
    source = facts["source"]
    made = f"stage {facts['stage']}, {facts['world_size']} ranks" if "stage" in facts else ""
    lines += [
        f"from         stage {source['stage']}, {source['world_size']} ranks",
        f"to           {made or 'the universal format'}",
        f"read         {size(facts['read_bytes'])}",
        f"write        {size(facts['write_bytes'])}, {size(facts['free_bytes'])} free",
    ]
    return "\n".join(lines + [f"note: {note}" for note in facts["notes"]])


def _proven(checks: dict[str, Any], size: Any) -> str:
    """One line: what was proven of the output, and what could not be."""
    line = (
        f"verified: the output, read again, has each element of {checks['parameters']} parameters, "
        f"{checks['states']} optimizer states and {checks['others']} other tensors where the "
        "source has it, so that the way back gives the same bits"
    )
    if checks["verified"]:
        line += f"; {size(checks['crc32_bytes'])} of the source agree with their CRC32s"
    else:
        line += "; bytes not verified (--no-verify)"
    if checks["no_crc32_bytes"]:
        line += f"; {size(checks['no_crc32_bytes'])} of the source carry no CRC32"
    if checks["read_back_bytes"]:
        line += f"; {size(checks['read_back_bytes'])} read back agree, too"
    return line


COMMANDS = (reshard, to_universal, from_universal)
