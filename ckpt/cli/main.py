"""The command ``ckpt``: its groups of commands, and the one door for failure.

stdout is data, stderr is talk. Exit codes: 0 done, 1 unusable checkpoint, no place for
the output or a bug of ckpt, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import NoReturn

import click

from ckpt.cli import hub, maintenance, rewrite, runs, weights
from ckpt.results import SCHEMA
from ckpt.version import __version__

SECTIONS = {
    "Weights": weights.COMMANDS,
    "Training states": rewrite.COMMANDS,
    "Runs": (*runs.COMMANDS, *maintenance.COMMANDS),
    "Hugging Face Hub": hub.COMMANDS,
}


class Sections(click.Group):
    """A group whose help lists its commands by what they are about."""

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a list for each section, in the order of ``SECTIONS``."""
        width = max(len(str(command.name)) for command in self.commands.values())
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                # of one width, so that the columns of all sections are below each other
                rows = [
                    (str(command.name).ljust(width), command.get_short_help_str(limit=200))
                    for command in commands
                ]
                formatter.write_dl(rows)


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckpt")
def cli() -> None:
    """DeepSpeed ZeRO checkpoints, managed and turned into weights.

    \b
    ckpt show out/checkpoint-500        what is in there, from headers only
    ckpt to-fp32 out/checkpoint-500     a model folder, out/checkpoint-500-fp32

    Neither torch nor deepspeed is needed, and no pickle is executed.
    """


for commands in SECTIONS.values():
    for command in commands:
        cli.add_command(command)


def main(argv: list[str] | None = None) -> None:
    """Runs the command and exits with its code; every failure is one line on stderr.

    A bug of ``ckpt`` is one, too, below its traceback.
    """
    from converters.errors import CheckpointError

    arguments = sys.argv[1:] if argv is None else argv
    try:
        exit_code = cli.main(args=arguments, prog_name="ckpt", standalone_mode=False)
        sys.exit(exit_code if isinstance(exit_code, int) else 0)
    except CheckpointError as error:
        _fail(str(error), error.kind, as_json="--json" in arguments)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("ckpt: interrupted; the same command continues where it stopped", err=True)
        sys.exit(130)
    except OSError as error:
        line = f"{error.filename or 'error'}: {error.strerror}"
        _fail(line, "system", as_json="--json" in arguments)
    except Exception as error:  # the last place where a bug of ours can be called one
        traceback.print_exc()
        name = type(error).__name__
        line = f"{name}: this is a bug of ckpt {__version__}; please report it with the lines above"
        _fail(line, "bug", as_json="--json" in arguments)


def _fail(message: str, kind: str, *, as_json: bool) -> NoReturn:
    """Prints one line on stderr, which is JSON where the command prints JSON, and exits with 1."""
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "error": message, "kind": kind}), err=True)
    else:
        click.echo(f"ckpt: {message}", err=True)
    sys.exit(1)
