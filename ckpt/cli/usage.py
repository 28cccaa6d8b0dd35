"""What was typed wrong, and what to type instead: a command that is not there, an argument too
many.

Only the words; ``main`` and ``options`` ask for them when something is wrong.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence

import click

from converters.words import verb

# What other tools call it, by the command that does it.
SYNONYMS = {
    "show": ("inspect", "info", "describe", "detect", "keys", "view", "stat", "cat", "open"),
    "to-fp32": (
        *("convert", "export", "extract", "consolidate", "fp32", "bf16", "to-bf16", "fp16"),
        *("to-fp16", "to-safetensors", "to-hf", "zero-to-fp32", "zero2fp32", "unshard"),
    ),
    "to-fp32 --merge": ("merge", "merge-lora", "merge-adapter", "merge-and-unload"),
    "reshard": ("reshape", "resize", "rescale", "repartition", "redistribute"),
    "to-universal": ("universal", "ds-to-universal"),
    "ls": ("list", "dir", "status", "checkpoints", "runs"),
    "latest": ("last", "newest", "find", "current"),
    "latest --best": ("best",),
    "verify": ("check", "validate", "fsck", "test"),
    "prune": ("rm", "remove", "delete", "del", "rotate", "clean", "cleanup", "gc"),
    "pin": ("keep", "protect", "lock"),
    "unpin": ("unprotect", "unlock"),
    "doctor --fix": ("fix", "repair", "recover", "mend"),
    "doctor --adopt": ("adopt", "commit"),
    "slim": ("shrink", "compact", "strip"),
    "collect": ("join", "combine"),
    "push": ("upload", "publish", "share"),
    "pull": ("download", "fetch", "clone", "get"),
    "--help": ("help",),
    "--version": ("version",),
}
# What is done from Python, and the command that comes closest.
_IN_PYTHON = {
    "resume": "ckpt.resume is for Python; ckpt latest prints the checkpoint that it takes",
    "load": "ckpt.open and ckpt.resume are for Python; ckpt show prints what a checkpoint holds",
    "save": "ckpt.Saver is for Python; ckpt ls prints what it saved",
}
_MEANINGS = {word: command for command, words in SYNONYMS.items() for word in words}


def unknown_command(word: str, short_helps: Mapping[str, str]) -> str:
    """The line for a word that is not a command, with the command that is meant, if that can be
    told. ``short_helps`` has what each command does by its name."""
    line = f"No such command {word!r}"
    key = word.lower().removesuffix(".py").replace("_", "-")
    if key in _IN_PYTHON:
        return f"{line}; {_IN_PYTHON[key]}."

    if key in _MEANINGS or key in short_helps:
        return f"{line}. Use {_described(_MEANINGS.get(key, key), short_helps)}"

    if os.sep in word or os.path.exists(word):
        return f"{word} is a path, not a command; name a command first: ckpt show {word}"

    matches = difflib.get_close_matches(key, [*short_helps, *_MEANINGS], cutoff=0.7)
    commands = list(dict.fromkeys(_MEANINGS.get(match, match) for match in matches))
    choices = " or ".join(f"ckpt {command}" for command in commands)
    return f"{line}. Did you mean {choices}?" if commands else f"{line}."


def _described(command: str, short_helps: Mapping[str, str]) -> str:
    """A command and what it does, as the end of a sentence."""
    short_help = short_helps.get(command, "")
    if not short_help:
        return f"ckpt {command}."
    return f"ckpt {command}: {short_help[0].lower()}{short_help[1:]}"


class Command(click.Command):
    """A command that says what to do with an argument too many."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses as click does; ``UsageError`` says where an output is named, and that a
        command takes one path at a time."""
        ctx.allow_extra_args = True
        extra_arguments = super().parse_args(ctx, args)
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
