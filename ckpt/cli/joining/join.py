"""The command ``ckpt join``: the output of shares that several commands wrote.

It repeats their command, which each process left in the staging folder, without a share
of its own: the plan is made again, the records of all shares prove the source, and the
folder gets its name.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from ckpt.cli.options import JSON, OUTPUT_PATH
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.usage.command import Command

DIVISIBLE = ("to-fp32", "reshard", "to-universal", "from-universal", "to-dcp", "from-dcp")


@click.command(cls=Command, short_help="Make the output of shares that --share wrote.")
@click.argument("output", type=OUTPUT_PATH)
@dry_run_option("Print what would be made, or name the shares that are missing.")
@JSON
def join(output: Path, dry_run: bool, as_json: bool) -> None:
    """Make the output of the shares that commands with --share wrote.

    OUTPUT is the folder (or file) that they were given or chose. Nothing is converted
    here: what the shares have seen of the checkpoint is proven together, and the output
    appears all at once. Shares that are missing are named.

    \b
    ckpt to-fp32 out/checkpoint-500 --share 1/2
    ckpt to-fp32 out/checkpoint-500 --share 2/2
    ckpt join out/checkpoint-500-fp32
    """
    from ckpt.cli.main import cli
    from ckpt.cli.planned import Invocation, Output, show
    from ckpt.cli.results.shares import JoinResult
    from ckpt.shares import share_folder
    from converters.errors import CheckpointError

    place = share_folder.place_of(output.absolute())
    if share_folder.is_joined(place):
        if not dry_run:
            share_folder.finish(place)
        show(Output(JoinResult(output=output, dry_run=dry_run), [output]), as_json)
        return

    command = share_folder.command_of(place)
    name, *_ = (*command.arguments, "")
    if name not in DIVISIBLE:
        raise CheckpointError(f"{output}: its shares are of no command of ckpt", "output")

    given_flags = {"--dry-run": dry_run, "--json": as_json}
    arguments = [word for word in command.arguments if word not in given_flags]
    os.chdir(command.folder)  # which relative paths are of
    cli.main(
        args=[*arguments, *(flag for flag, is_given in given_flags.items() if is_given)],
        prog_name="ckpt",
        standalone_mode=False,
        obj=Invocation(arguments=tuple(arguments), joined_output=place),
    )


COMMANDS = (join,)
