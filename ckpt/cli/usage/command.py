"""A command that says what to do with an argument too many."""

from __future__ import annotations

from collections.abc import Sequence

import click

from converters.words import verb


class Command(click.Command):
    """A command that says what to do with an argument too many."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses as click does; ``UsageError`` says where an output is named, and that a
        command takes one path at a time."""
        ctx.allow_extra_args = True
        try:
            extra_arguments = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from ckpt.cli.usage import synonyms

            message = synonyms.unknown_option(error.message, error.option_name, self.name)
            meant = synonyms.meant_option(error.option_name)
            if any(meant in param.opts for param in self.params):
                message = f"{message.rstrip('.')}. Use {meant}."
            # click asks "Did you mean" of what looks like it
            possibilities = error.possibilities if meant is None else None
            raise click.NoSuchOption(
                error.option_name, message, possibilities, error.ctx
            ) from error
        if extra_arguments and not ctx.resilient_parsing:
            ctx.fail(_extra(self, ctx, extra_arguments))

        return extra_arguments


def _extra(command: click.Command, context: click.Context, extra_arguments: Sequence[str]) -> str:
    options = [param for param in command.params if isinstance(param, click.Option)]
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    names = " and ".join(argument.metavar or str(argument.name).upper() for argument in arguments)
    listed = ", ".join(extra_arguments)

    is_verb = verb(len(extra_arguments), "is", "are")
    line = f"{context.command_path} takes {names}; {listed} {is_verb} too much"
    if len(extra_arguments) == 1 and any(option.name == "output" for option in options):
        return f"{line}. To write to {listed}, say -o {listed}."

    return f"{line}. Call it once for each." if len(arguments) == 1 else f"{line}."
