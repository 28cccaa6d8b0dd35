"""The command that writes training states for FSDP: ``to-dcp``. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.options import CHECKPOINT, OUTPUT_PATH, TAG
from ckpt.cli.rewrite import SHARED, run, with_options
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
    optimizer are those of CHECKPOINT, bit for bit. A model folder has weights only.

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


COMMANDS = (to_dcp,)
