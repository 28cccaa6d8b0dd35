"""The command ``ckpt``: its groups of commands, and the one door for failure.

stdout is data, stderr is talk. Exit codes: 0 done, 1 unusable checkpoint, no place for
the output or a bug of ckpt, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from importlib import import_module
from typing import NoReturn

import click

from ckpt.version import __version__
from converters.errors import one_line

SECTIONS = {  # the commands, each with the module of this package that has it
    "Weights": {
        "show": "weights",
        "stats": "inspection.numbers",
        "diff": "inspection.differences",
        "to-fp32": "weights",
    },
    "Training states": {
        "reshard": "rewrite",
        "to-universal": "rewrite",
        "from-universal": "rewrite",
        "to-dcp": "crossing.dcp",
        "from-dcp": "crossing.dcp",
        "join": "joining.join",
    },
    "Runs": {
        "ls": "runs",
        "latest": "runs",
        "verify": "runs",
        "prune": "runs",
        "pin": "runs",
        "unpin": "runs",
        "doctor": "maintenance",
        "slim": "maintenance",
        "collect": "maintenance",
    },
    "Hugging Face Hub": {"push": "hub", "pull": "hub"},
}
_MODULES = {name: module for section in SECTIONS.values() for name, module in section.items()}


class Sections(click.Group):
    """A group whose help lists its commands by what they are about.

    The module of a command is loaded when the command is used, so that each starts at
    once.
    """

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(_MODULES)

    def get_command(self, _ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """The command of this name; ``None`` if there is none."""
        if cmd_name not in _MODULES:
            return None
        module = import_module(f"ckpt.cli.{_MODULES[cmd_name]}")
        in_module: tuple[click.Command, ...] = module.COMMANDS
        return next(command for command in in_module if command.name == cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is called; ``UsageError`` names the one that was meant."""
        word = args[0]
        is_unknown = word not in _MODULES and not word.startswith("-")
        if is_unknown and not ctx.resilient_parsing:
            from ckpt.cli.usage import synonyms

            short_helps = {
                name: command.get_short_help_str(limit=200) for name, command in commands().items()
            }
            ctx.fail(synonyms.unknown_command(word, short_helps))

        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a list for each section, in the order of ``SECTIONS``."""
        width = max(map(len, _MODULES))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                commands = [self.get_command(ctx, name) for name in names]
                # of one width, so that the columns of all sections are below each other
                rows = [
                    (str(command.name).ljust(width), command.get_short_help_str(limit=200))
                    for command in commands
                    if command is not None
                ]
                formatter.write_dl(rows)


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckpt")
def cli() -> None:
    """Checkpoints of DeepSpeed ZeRO and FSDP, managed and turned into weights.

    \b
    ckpt show out/checkpoint-500        what is in there, from headers only
    ckpt to-fp32 out/checkpoint-500     a model folder, out/checkpoint-500-fp32

    Neither torch nor deepspeed is needed, and no pickle is executed.
    """


def commands() -> dict[str, click.Command]:
    """All commands by their names, which loads the modules of all."""
    loaded = {name: cli.get_command(None, name) for name in _MODULES}
    return {name: command for name, command in loaded.items() if command is not None}


def main(argv: list[str] | None = None) -> None:
    """Runs the command and exits with its code; every failure is one line on stderr.

    A bug of ``ckpt`` is one, too, below its traceback.
    """
    from ckpt.cli.planned import Invocation
    from converters import options
    from converters.errors import CheckpointError, shortage

    _replace_closed_streams()
    arguments = sys.argv[1:] if argv is None else argv
    # Commands make few circles; looking for them so often takes 8 % of the time of a
    # small one.
    gc.set_threshold(20_000)
    try:
        with options.using(options.of_commands, overrides=True):
            exit_code = cli.main(
                args=arguments,
                prog_name="ckpt",
                standalone_mode=False,
                obj=Invocation(tuple(arguments)),
            )
        sys.exit(exit_code if isinstance(exit_code, int) else 0)
    except CheckpointError as error:
        _fail(str(error), error.kind, as_json="--json" in arguments)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        line = "; ".join(filter(None, ["interrupted", _aftermath(error)]))
        click.echo(f"ckpt: {one_line(line)}", err=True)
        sys.exit(130)
    except OSError as error:
        line = shortage(error) or f"{error.filename or 'error'}: {error.strerror}"
        _fail(line, "system", as_json="--json" in arguments)
    except Exception as error:  # the last place where a bug of ours can be called one
        if (sentence := shortage(error)) is not None:
            _fail(sentence, "system", as_json="--json" in arguments)
        traceback.print_exc()
        name = type(error).__name__
        line = f"{name}: this is a bug of ckpt {__version__}; please report it with the lines above"
        _fail(line, "bug", as_json="--json" in arguments)


def _replace_closed_streams() -> None:
    """Gives a command that was started without stdin, stdout or stderr the null device.

    Daemons start programs so. Else the first file that is opened would be what libraries
    take for one of these three.
    """
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if all(stream is not None for stream in streams):
        return

    from converters.storage.system import opening

    descriptor = opening.descriptor(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        stream or os.fdopen(number, "r" if number == 0 else "w")
        for number, stream in enumerate(streams)
    )


def _aftermath(error: BaseException) -> str:
    """A sentence on what an interrupted command leaves, if it says that."""
    from ckpt.cli.planned import Interruption

    # click makes an Abort of the interruption
    interruption = error.__cause__ if isinstance(error, click.Abort) else error
    return str(interruption) if isinstance(interruption, Interruption) else ""


def _fail(message: str, kind: str, *, as_json: bool) -> NoReturn:
    """Prints one line on stderr,
    which is JSON where the command prints JSON, and exits with 1."""
    if as_json:
        from ckpt.results import SCHEMA

        click.echo(json.dumps({"schema": SCHEMA, "error": message, "kind": kind}), err=True)
    else:
        click.echo(f"ckpt: {one_line(message)}", err=True)
    sys.exit(1)
