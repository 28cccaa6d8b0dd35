"""The command ``ckpt``: parse, call, print.

stdout is data, stderr is talk. Exit codes: 0 done, 1 unusable checkpoint or no place for the
output, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ckpt import __version__, states_commands
from ckpt.hub import commands as hub_commands
from ckpt.runs import commands
from ckpt.terminal import CHECKPOINT, DTYPE, JSON, MAX_SHARD_SIZE, TAG, facts_as_json, progress


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckpt")
def cli() -> None:
    """DeepSpeed ZeRO checkpoints, managed and turned into weights.

    \b
    ckpt show out/checkpoint-500        what is in there, from headers only
    ckpt to-fp32 out/checkpoint-500     a model folder, out/checkpoint-500-fp32

    Neither torch nor deepspeed is needed, and no pickle is executed.
    """


@cli.command("to-fp32")
@CHECKPOINT
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Default: CHECKPOINT-fp32 (-bf16, ...)."
)
@TAG
@DTYPE
@MAX_SHARD_SIZE
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "bin"]),
    default="safetensors",
    show_default=True,
    help="model.safetensors or pytorch_model.bin, in shards with an index where it is larger.",
)
@click.option(
    "--tied",
    type=click.Choice(["keep", "drop"]),
    help="Write tied names again, or only once. Default: what from_pretrained of the model wants.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option(
    "--no-verify",
    is_flag=True,
    help="Skip CRC32s (a twentieth of the time) and the comparison with 16-bit copies (half as "
    "much again to read).",
)
@click.option("--allow-overflow", is_flag=True, help="Let values too large for fp16 become inf.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that exists.")
@click.option("--workers", type=click.IntRange(1, 64), help="Threads that move bytes.")
@JSON
def to_fp32(
    checkpoint: Path,
    output: Path | None,
    tag: str | None,
    dtype: str,
    max_shard_size: int,
    file_format: Any,
    tied: Any,
    dry_run: bool,
    no_verify: bool,
    allow_overflow: bool,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Convert a ZeRO checkpoint to a model folder of fp32 or 16-bit weights.

    CHECKPOINT is a Trainer folder (with the file latest in it), a save_dir of DeepSpeed, or a tag
    folder. The output appears all at once; an interrupted conversion continues where it stopped.

    \b
    ckpt to-fp32 out/checkpoint-500
    ckpt to-fp32 out/checkpoint-500 -o model --dtype bf16 --max-shard-size 2GB
    ckpt to-fp32 out --tag global_step500 --format bin
    ckpt to-fp32 out/checkpoint-500 --dry-run
    """
    from ckpt import convert, report

    conversion = convert.prepare(
        checkpoint,
        output,
        tag=tag,
        dtype=dtype,
        max_shard_size=max_shard_size,
        format=file_format,
        tied=tied,
    )
    if dry_run:
        facts = report.dry_run(conversion, verify=not no_verify, workers=workers)
        click.echo(facts_as_json(facts) if as_json else report.dry_run_text(conversion, facts))
        return
    with progress(conversion.plan.nbytes, conversion.output.name) as moved:
        facts = convert.run(
            conversion,
            verify=not no_verify,
            allow_overflow=allow_overflow,
            overwrite=overwrite,
            workers=workers,
            progress=moved,
        )
    if as_json:
        click.echo(facts_as_json({"output": str(conversion.output)} | facts))
        return
    click.echo(conversion.output)
    click.echo(report.verified(facts))
    for line in report.warnings(facts):
        click.echo(line, err=True)


@cli.command()
@CHECKPOINT
@TAG
@click.option("--tensors", is_flag=True, help="List every tensor: name, type, shape.")
@JSON
def show(checkpoint: Path, tag: str | None, tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint is and holds, from headers only.

    \b
    ckpt show out/checkpoint-500
    ckpt show out --tag global_step500 --tensors
    """
    from ckpt import report
    from converters import zero

    facts = report.show(zero.read(checkpoint, tag), tensors)
    click.echo(facts_as_json(facts) if as_json else report.show_text(facts))


for command in (
    *commands.COMMANDS,
    *hub_commands.COMMANDS,
    *states_commands.COMMANDS,
):
    cli.add_command(command)


def main(argv: list[str] | None = None) -> None:
    """Runs the command and exits with its code; every failure is one line on stderr."""
    from converters.errors import CheckpointError

    args = sys.argv[1:] if argv is None else argv
    try:
        code = cli.main(args=args, prog_name="ckpt", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except CheckpointError as error:
        if "--json" in args:
            click.echo(json.dumps({"error": str(error), "kind": error.kind}), err=True)
        else:
            click.echo(f"ckpt: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("ckpt: interrupted; the same command continues where it stopped", err=True)
        sys.exit(130)
    except OSError as error:
        click.echo(f"ckpt: {error.filename or 'error'}: {error.strerror}", err=True)
        sys.exit(1)
