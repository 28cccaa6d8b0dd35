"""The commands that make weights of a checkpoint: ``show`` and ``to-fp32``.

They parse, call and print.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import planned
from ckpt.cli.options import (
    CHECKPOINT,
    DTYPE,
    JSON,
    LAST,
    LOCAL_PATH,
    MAX_SHARD_SIZE,
    OUTPUT_PATH,
    SHARE,
    TAG,
    checkpoint_of,
    dry_run,
)
from ckpt.cli.planned import Output, Planned, Progress
from ckpt.cli.usage.command import Command
from ckpt.cli.weight_options import TP_RULES, weights_options
from ckpt.cli.weight_options import request as weights_request

if TYPE_CHECKING:
    from ckpt.cli.results.conversion import ConversionResult
    from ckpt.runs.states.status import CheckpointStatus
    from ckpt.shares.division import Divisible, Division
    from ckpt.weights.conversion.task import Conversion
    from ckpt.weights.request import Names
    from converters.source import Source


@click.command("to-fp32", cls=Command, short_help="Make a model folder of fp32 or 16-bit weights.")
@CHECKPOINT
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    help="Default: CHECKPOINT-fp32 (-bf16, -16bit, ...).",
)
@TAG
@LAST
@DTYPE
@MAX_SHARD_SIZE
@click.option(
    "--format",
    type=click.Choice(["safetensors", "bin", "lightning"]),
    default="safetensors",
    show_default=True,
    help="model.safetensors or pytorch_model.bin, in shards with an index where it is larger; or "
    "of a Lightning checkpoint, the file that load_from_checkpoint reads (-o x.ckpt).",
)
@click.option(
    "--tied",
    type=click.Choice(["keep", "drop"]),
    help="Write tied names again, or only once. Default: what from_pretrained of the model wants.",
)
@dry_run("Print the plan and write nothing.")
@click.option(
    "--no-verify",
    is_flag=True,
    help="Skip checksums (about 5 % of the time) and the comparison with 16-bit weights (reads "
    "50 % more).",
)
@click.option("--allow-overflow", is_flag=True, help="Let values too large for fp16 become inf.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that exists.")
@click.option("--workers", metavar="N", type=click.IntRange(1, 64), help="Threads that move bytes.")
@SHARE
@weights_options
@JSON
@planned.opening_once
@planned.divided
def to_fp32(
    checkpoint: Path,
    output: Path | None,
    dry_run: bool,
    no_verify: bool,
    allow_overflow: bool,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a checkpoint of ZeRO or FSDP to a model folder of fp32 or 16-bit weights.

    CHECKPOINT is a Trainer folder (with the file latest in it), a save_dir of
    DeepSpeed, a tag folder, a universal one, or a folder of FSDP or
    torch.distributed.checkpoint; with --last a run. The output appears all at once; an
    interrupted conversion continues where it stopped.

    \b
    ckpt to-fp32 out/checkpoint-500
    ckpt to-fp32 out/checkpoint-500 -o model --dtype bf16 --max-shard-size 2GB
    ckpt to-fp32 out --tag global_step500 --format bin
    ckpt to-fp32 out --last
    ckpt to-fp32 out/checkpoint-500 --dry-run
    """
    from ckpt.cli import conversion as reports
    from ckpt.weights.conversion import convert

    division: Division | None = options.pop("division")
    checkpoint = checkpoint_of(checkpoint, options["tag"], options.pop("last"), "ckpt to-fp32")
    request = weights_request(options)
    conversion = convert.plan(checkpoint, output, request=request, **options)
    preview = reports.preview(conversion, not no_verify, workers) if dry_run or as_json else None

    writing = {
        "verify": not no_verify,
        "allow_overflow": allow_overflow,
        "overwrite": overwrite,
    }

    def execute(progress: Progress, share_count: int | None = None) -> Output:
        record = convert.execute(
            conversion, workers=workers, progress=progress, share_count=share_count, **writing
        )
        return Output(
            None if preview is None else reports.result(preview, conversion, record),
            lines=[conversion.output, reports.verified(record), record.verdict],
            notices=reports.warnings(record),
        )

    planned.run(
        Planned(
            preview=lambda: _previewed(conversion, preview, overwrite),
            execute=execute,
            nbytes=conversion.plan.nbytes,
            title=conversion.output.name,
            opening=lambda: planned.opening(convert.continuation(conversion)),
            interruption=lambda: planned.interruption(convert.continuation(conversion)),
            divisible=lambda: _divisible(conversion, execute, workers, writing),
        ),
        dry_run=dry_run,
        as_json=as_json,
        division=division,
    )


def _divisible(
    conversion: Conversion,
    execute: Callable[[Progress, int], Output],
    workers: int | None,
    options: dict[str, bool],
) -> Divisible:
    """A conversion as several processes do it."""
    from ckpt.weights.conversion import weight_shares

    return weight_shares.divisible(conversion, execute, workers, **options)


def _previewed(conversion: Conversion, preview: ConversionResult | None, overwrite: bool) -> Output:
    """The output of a dry run;
    ``CheckpointError`` where the real one could not be made."""
    from ckpt.cli import conversion as reports
    from ckpt.weights.conversion import convert

    assert preview is not None  # which is made for every dry run
    convert.require_output(conversion, overwrite)
    output = Output(preview, reports.preview_lines(conversion, preview))
    return planned.unfitting(output, convert.shortage(conversion))


@click.command(cls=Command, short_help="Show what a checkpoint is and holds.")
@CHECKPOINT
@TAG
@LAST
@click.option("--tensors", is_flag=True, help="List every tensor: name, type, shape.")
@click.option(
    "--names",
    type=click.Choice(["reader", "as-stored", "hf"]),
    default="as-stored",
    show_default=True,
    help="With --tensors: the names in the checkpoint, or those that to-fp32 --names writes.",
)
@click.option(
    "--config",
    metavar="PATH",
    type=LOCAL_PATH,
    help="With --names: the config.json (or its folder), where the checkpoint has none.",
)
@TP_RULES
@JSON
@planned.opening_once
def show(
    checkpoint: Path,
    tag: str | None,
    last: bool,
    tensors: bool,
    names: Names,
    config: Path | None,
    tp_rules: Path | None,
    as_json: bool,
) -> None:
    """Show what a checkpoint is and holds, from headers only.

    CHECKPOINT is also a model folder, or a file in safetensors or of torch.save.

    \b
    ckpt show out/checkpoint-500
    ckpt show out/checkpoint-500/scheduler.pt
    ckpt show out --tag global_step500 --tensors
    ckpt show out/checkpoint-500 --tensors --names hf
    ckpt show out --last
    """
    from ckpt.cli import report
    from ckpt.weights.conversion import sources
    from ckpt.weights.opening import wished_names

    checkpoint = checkpoint_of(checkpoint, tag, last, "ckpt show")
    with _rules(tp_rules):
        source = sources.as_stored(checkpoint, tag, "ckpt to-fp32 --weights 16bit")
        wished = wished_names.of(source.weights, source, names=names, config=config)
        notes = (*source.notes, *wished.notes)
        source = replace(source, weights=wished.weights, notes=notes)
        result = report.show(source, tensors, _status(source))
    planned.show(Output(result, lines=report.show_lines(result)), as_json)


def _rules(path: Path | None) -> AbstractContextManager[None]:
    """What a checkpoint is read within, where a file says how its parameters were cut."""
    if path is None:
        return nullcontext()

    from converters.zero.parallel import rules

    return rules.using(path)


_OF_TRAINERS = ("accelerate", "lightning-file")  # kinds of a training that no sign tells


def _status(source: Source) -> CheckpointStatus | None:
    """How far a checkpoint can be relied on; ``None`` for a model alone, and in a store."""
    from ckpt.folders.filenames import MANIFEST
    from ckpt.runs.states import listing
    from ckpt.runs.states.status import statuses_of
    from converters.detect.filenames import TRAINER_STATE
    from converters.storage.store import is_url

    if is_url(source.place.root):
        return None
    if source.topology is None:
        place = source.place.folder
        signs = (MANIFEST, TRAINER_STATE)  # of a slimmed one, and of a Trainer without DeepSpeed
        is_of_training = source.kind in _OF_TRAINERS or any(
            (place / name).is_file() for name in signs
        )
        return statuses_of([listing.candidate(place)], wait=False)[0] if is_of_training else None

    tag_folder, root = source.place.folder, source.place.root
    parents = list(tag_folder.parents)[:2]  # of several engines the second has the manifest
    folder = next((parent for parent in parents if (parent / MANIFEST).is_file()), None)
    if folder is None:
        folder = root if listing.is_single(root) else tag_folder
    return statuses_of([listing.candidate(folder)], wait=False)[0]


COMMANDS = (show, to_fp32)
