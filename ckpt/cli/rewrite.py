"""The commands that rewrite training states:
``reshard``, ``to-universal``, ``from-universal``.

They parse, call and print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import planned
from ckpt.cli.options import CHECKPOINT, JSON, LOCAL_PATH, OUTPUT_PATH, SHARE, TAG
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output, Planned, Progress
from ckpt.cli.usage.command import Command
from ckpt.cli.weight_options import TP_RULES
from converters.words import counted

if TYPE_CHECKING:
    from ckpt.rewrite.output_folder import PlannedOutput
    from ckpt.rewrite.result import RewriteChecks, RewriteResult
    from ckpt.shares.division import Division

SHARED = (
    dry_run_option("Print the plan and write nothing."),
    click.option(
        "--no-verify",
        is_flag=True,
        help="Skip the CRC32s of what is read. Every element's place is proven anyway.",
    ),
    click.option(
        "--read-back",
        is_flag=True,
        help="Read the finished files once more and compare CRC32s, where the disk is not trusted.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an output folder that exists."),
    click.option(
        "--workers", metavar="N", type=click.IntRange(1, 64), help="Threads that move bytes."
    ),
    SHARE,
    JSON,
)


def world_size_option(**settings: Any) -> Callable[..., Any]:
    """The option --world-size, with these settings of click."""
    return click.option("--world-size", metavar="RANKS", type=click.IntRange(1), **settings)


NATIVE = (
    click.option(
        "--stage",
        metavar="N",
        type=click.IntRange(0, 3),
        help="The ZeRO stage, or 0 for fp32 without ZeRO. Default: that of the run.",
    ),
    click.option(
        "-o",
        "--output",
        type=OUTPUT_PATH,
        help="Default: CHECKPOINT-wRANKS.",
    ),
    click.option(
        "--sub-group-size",
        metavar="ELEMENTS",
        type=click.IntRange(1),
        help="The sub_group_size of the engine that will resume with stage 3. Default: that of the "
        "run.",
    ),
    click.option(
        "--zero-init/--no-zero-init",
        default=None,
        help="For Muon, from stage 1 or 2 to 3: whether the model will be created under "
        "deepspeed.zero.Init, as the Trainer does it.",
    ),
)
DEGREES = (
    click.option(
        "--tp",
        metavar="RANKS",
        type=click.IntRange(1),
        help="The tensor-parallel ranks among them. Default: 1, for ZeRO alone.",
    ),
    click.option(
        "--ep",
        metavar="RANKS",
        type=click.IntRange(1),
        help="The ranks that the experts of each layer are dealt out to. Default: as many as "
        "saved.",
    ),
    TP_RULES,
)


# what the options above are as arguments, but for the output
TARGET = ("stage", "sub_group_size", "zero_init", "tp", "ep", "tp_rules")


def _take(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values of some options, which are taken out of ``options``."""
    return {name: options.pop(name) for name in names}


def with_options(
    options: Sequence[Callable[..., Any]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Several options as one decorator; they are listed in this order."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


@click.command(cls=Command, short_help="Rewrite a state for other ranks or another stage.")
@CHECKPOINT
@world_size_option(help="The ranks (GPUs) that will resume. Default: as many as saved.")
@with_options(NATIVE)
@with_options(DEGREES)
@click.option(
    "--pp",
    metavar="STAGES",
    help="For a pipeline: the layers of each stage, and the tied modules in it, as in "
    "0-2+embed,3-+embed, or 1 for one stage. Default: none, for a plain module.",
)
@TAG
@with_options(SHARED)
@planned.opening_once
@planned.divided
def reshard(
    checkpoint: Path,
    world_size: int | None,
    output: Path | None,
    tag: str | None,
    **options: Any,
) -> None:
    """Rewrite a checkpoint for another number of ranks, or another stage.

    One of tensor parallelism, of a pipeline or of MiCS is written for ZeRO alone, or for
    the tensor-parallel ranks of --tp; a pipeline for the stages of --pp, too, each of the
    ranks of --tp. One of experts is written for the ranks of --ep. The output holds
    DeepSpeed's own files, which engine.load_checkpoint and the Trainer's
    resume_from_checkpoint load as they load any.
    Weights, every optimizer state, steps, loss scale, scheduler and client state are those
    of CHECKPOINT, bit for bit.

    \b
    ckpt reshard out/checkpoint-500 --world-size 3
    ckpt reshard out/checkpoint-500 --stage 3
    ckpt reshard out/checkpoint-500 --world-size 8 --stage 3 -o resume/checkpoint-500
    ckpt reshard out/checkpoint-500 --world-size 8 --tp 2
    ckpt reshard out/checkpoint-500 --world-size 8 --ep 4
    ckpt reshard out/checkpoint-500 --world-size 8 --pp 0-4+embed,5-9+embed
    ckpt reshard out/checkpoint-500 --world-size 3 --dry-run
    """
    from ckpt.rewrite import job
    from ckpt.rewrite import reshard as resharding

    settings = _take(options, (*TARGET, "pp"))
    rewriting = resharding.plan(checkpoint, world_size, output=output, tag=tag, **settings)

    run(rewriting, job, **options)


@click.command("to-universal", cls=Command, short_help="Write a state in the universal format.")
@CHECKPOINT
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    help="Default: CHECKPOINT_universal.",
)
@TP_RULES
@TAG
@with_options(SHARED)
@planned.opening_once
@planned.divided
def to_universal(
    checkpoint: Path,
    output: Path | None,
    tp_rules: Path | None,
    tag: str | None,
    **options: Any,
) -> None:
    """Write a checkpoint in DeepSpeed's universal format.

    The output is loaded on any number of ranks by a stock engine of stage 1, 2 or 3
    that has "checkpoint": {"load_universal": true} in its configuration. ckpt reshard
    makes files that load without it.

    \b
    ckpt to-universal out/checkpoint-500
    ckpt to-universal out/checkpoint-500 --dry-run
    """
    from ckpt.rewrite import job, universal

    rewriting = universal.plan_to(checkpoint, output=output, tag=tag, tp_rules=tp_rules)

    run(rewriting, job, **options)


@click.command(
    "from-universal", cls=Command, short_help="Write native files from a universal folder."
)
@CHECKPOINT
@world_size_option(help="The ranks (GPUs) that will resume; there is no default.")
@with_options(NATIVE)
@click.option(
    "--tag", metavar="TAG", help="The tag to read. Default: what the file latest_universal names."
)
@click.option(
    "--like",
    metavar="CHECKPOINT",
    type=LOCAL_PATH,
    help="A native checkpoint of the same model, where the folder does not tell the order of the "
    "parameters.",
)
@with_options(DEGREES)
@with_options(SHARED)
@planned.opening_once
@planned.divided
def from_universal(
    checkpoint: Path,
    world_size: int | None,
    output: Path | None,
    tag: str | None,
    like: Path | None,
    **options: Any,
) -> None:
    """Write DeepSpeed's native files from a universal folder, whoever made it.

    The output is loaded by plain engine.load_checkpoint, and by the Trainer. It is for ZeRO
    alone, for the tensor-parallel ranks of --tp or, of experts, for the ranks of --ep.

    \b
    ckpt from-universal out/checkpoint-500_universal --world-size 3
    ckpt from-universal out/checkpoint-500_universal --world-size 8 --stage 3 -o resume
    """
    from ckpt.rewrite import job, universal

    settings = _take(options, TARGET)
    rewriting = universal.plan_from(
        checkpoint, world_size, output=output, tag=tag, like=like, **settings
    )

    run(rewriting, job, **options)


def run(
    rewriting: PlannedOutput,
    job: ModuleType,
    dry_run: bool,
    no_verify: bool,
    read_back: bool,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
    division: Division | None,
) -> None:
    """Prints what would be done, or does it and prints that.

    ``job`` is the module that does it: ``ckpt.rewrite.job`` or
    ``ckpt.rewrite.crossing``.
    """
    from ckpt.rewrite import output_folder, state_work

    verify = not no_verify

    def preview() -> Output:
        output_folder.require_output(rewriting, overwrite)
        result = job.preview(rewriting)
        output = Output(result, _preview_lines(result))
        return planned.unfitting(output, output_folder.shortage(rewriting))

    def execute(progress: Progress, share_count: int | None = None) -> Output:
        result = job.execute(
            rewriting,
            verify=verify,
            read_back=read_back,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
            share_count=share_count,
        )
        assert result.checks is not None
        lines = [rewriting.output, _proven(result.checks)]
        return Output(result, lines, [f"note: {note}" for note in result.notes])

    planned.run(
        Planned(
            preview=preview,
            execute=execute,
            nbytes=rewriting.plan.nbytes,
            title=rewriting.output.name,
            opening=lambda: planned.opening(output_folder.continuation(rewriting)),
            interruption=lambda: planned.interruption(output_folder.continuation(rewriting)),
            divisible=lambda: state_work.divisible(rewriting, execute, verify, overwrite, workers),
        ),
        dry_run=dry_run,
        as_json=as_json,
        division=division,
    )


def _preview_lines(result: RewriteResult) -> list[str]:
    from ckpt.text import size
    from converters.detect import sharded

    lines = [f"{result.output}/{file.name}\t{size(file.nbytes)}" for file in result.files]
    lines += [f"{result.output}/{name}\tcopied" for name in sorted(result.copied_files)]

    source = result.source
    origin = "torch's DCP" if source.kind in sharded.READ else "weights alone"
    if source.stage is not None:
        origin = f"stage {source.stage}, {counted(source.world_size or 1, 'rank')}"
    lines += [
        f"from         {origin}",
        f"to           {_target(result)}",
        f"read         {size(result.read_bytes)}",
        f"write        {size(result.write_bytes)}, {size(result.free_bytes)} free",
    ]

    return lines + [f"note: {note}" for note in result.notes]


def _target(result: RewriteResult) -> str:
    """The target in words."""
    if result.world_size is not None:
        return f"stage {result.stage}, {counted(result.world_size, 'rank')}"
    return "torch's DCP" if result.tag is None else "the universal format"


def _proven(checks: RewriteChecks) -> str:
    """One line: what was proven of the output, and what could not be."""
    from ckpt.text import size

    line = (
        "verified: the output was read back; "
        f"{counted(checks.parameter_tensors, 'parameter')}, "
        f"{counted(checks.optimizer_tensors, 'optimizer state')} and "
        f"{counted(checks.other_tensors, 'other tensor')} match the source element by "
        "element"
    )

    if checks.verified:
        line += f"; {size(checks.crc32_bytes)} of the source agree with their CRC32s"
    else:
        line += "; bytes not verified (--no-verify)"

    if checks.no_crc32_bytes:
        line += f"; {size(checks.no_crc32_bytes)} of the source carry no CRC32"
    if checks.read_back_bytes:
        line += f"; {size(checks.read_back_bytes)} of the output agree with their CRC32s, too"

    return line


COMMANDS = (reshard, to_universal, from_universal)
