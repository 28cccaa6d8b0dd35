"""The commands that cross between DeepSpeed and FSDP: ``to-dcp``, ``from-dcp``.

They parse, call and print.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import planned
from ckpt.cli.options import CHECKPOINT, OUTPUT_PATH, TAG
from ckpt.cli.rewrite import SHARED, run, with_options, world_size_option
from ckpt.cli.usage.command import Command
from ckpt.cli.weight_options import TP_RULES

if TYPE_CHECKING:
    from converters.dcp.writing.layouts import LayoutName


@click.command("to-dcp", cls=Command, short_help="Write a state for FSDP, as torch's DCP.")
@CHECKPOINT
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    help="Default: CHECKPOINT-dcp.",
)
@click.option(
    "--layout",
    type=click.Choice(["plain", "accelerate", "torchtitan"]),
    default="plain",
    show_default=True,
    help="Who loads it: a script that calls dcp.load; the Trainer or Accelerate with FSDP; "
    "torchtitan.",
)
@click.option(
    "--files",
    metavar="N",
    type=click.IntRange(1, 4096),
    help="The files that hold the bytes. Default: as many as the ranks that saved, at most 8.",
)
@TP_RULES
@TAG
@with_options(SHARED)
@planned.opening_once
@planned.divided
def to_dcp(
    checkpoint: Path,
    output: Path | None,
    layout: LayoutName,
    files: int | None,
    tp_rules: Path | None,
    tag: str | None,
    **options: Any,
) -> None:
    """Write a checkpoint as a distributed checkpoint of torch, which FSDP loads.

    torch.distributed.checkpoint.load reads it on any number of ranks, with FSDP2, FSDP1, DDP
    or one process. Weights (the fp32 ones), every optimizer state, steps and options of the
    optimizer are those of CHECKPOINT, bit for bit. A model folder has weights only, and so has
    what is written of a checkpoint of the Trainer or Accelerate without DeepSpeed and FSDP.

    \b
    ckpt to-dcp out/checkpoint-500
    ckpt to-dcp out/checkpoint-500 --layout accelerate -o fsdp/checkpoint-500
    ckpt to-dcp out/checkpoint-500 --files 4 --dry-run
    """
    from ckpt.rewrite import crossing, dcp

    plan = dcp.plan_to(
        checkpoint, output=output, layout=layout, files=files, tag=tag, tp_rules=tp_rules
    )

    run(plan, crossing, **options)


@click.command("from-dcp", cls=Command, short_help="Write native ZeRO files of an FSDP checkpoint.")
@CHECKPOINT
@world_size_option(required=True, help="The ranks (GPUs) that will resume.")
@click.option(
    "--stage", metavar="N", type=click.IntRange(1, 3), required=True, help="The ZeRO stage."
)
@click.option("-o", "--output", type=OUTPUT_PATH, help="Default: CHECKPOINT-zN-wRANKS.")
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp32"]),
    default="bf16",
    show_default=True,
    help="What the engine will compute in.",
)
@click.option(
    "--buffer",
    metavar="NAME",
    multiple=True,
    help="A tensor that is a buffer of the model, and no frozen parameter. May be repeated.",
)
@click.option(
    "--sub-group-size",
    metavar="ELEMENTS",
    type=click.IntRange(1),
    help="The sub_group_size of the engine that will resume with stage 3. Default: DeepSpeed's.",
)
@with_options(SHARED)
@planned.opening_once
@planned.divided
def from_dcp(
    checkpoint: Path,
    world_size: int,
    stage: int,
    output: Path | None,
    dtype: str,
    buffer: tuple[str, ...],
    sub_group_size: int | None,
    **options: Any,
) -> None:
    """Write DeepSpeed's native files of a checkpoint that FSDP or dcp.save wrote.

    The output is loaded by plain engine.load_checkpoint, and by the Trainer. Weights, every
    optimizer state, steps and options of the optimizer are those of CHECKPOINT.

    \b
    ckpt from-dcp out/checkpoint-500 --world-size 4 --stage 2
    ckpt from-dcp outputs/step-1000 --world-size 8 --stage 3 -o resume/checkpoint-1000
    """
    from ckpt.rewrite import crossing, dcp

    plan = dcp.plan_from(
        checkpoint,
        world_size,
        stage=stage,
        output=output,
        dtype=dtype,
        buffer=buffer,
        sub_group_size=sub_group_size,
    )

    run(plan, crossing, **options)


COMMANDS = (to_dcp, from_dcp)
