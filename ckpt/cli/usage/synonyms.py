"""The command that is meant by a word that is not a command: by what other tools call
it, or by its letters."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

# What other tools call it, by the command that does it.
SYNONYMS = {
    "show": ("inspect", "info", "describe", "detect", "keys", "view", "stat", "cat", "open"),
    "stats": ("statistics", "summary", "histogram", "norms", "nan"),
    "diff": ("compare", "difference", "cmp", "delta"),
    "to-fp32": (
        *("convert", "export", "extract", "consolidate", "fp32", "bf16", "to-bf16", "fp16"),
        *("to-fp16", "to-safetensors", "to-hf", "zero-to-fp32", "zero2fp32", "unshard"),
    ),
    "to-fp32 --merge": ("merge", "merge-lora", "merge-adapter", "merge-and-unload"),
    "reshard": ("reshape", "resize", "rescale", "repartition", "redistribute"),
    "to-universal": ("universal", "ds-to-universal"),
    "to-dcp": ("dcp", "to-fsdp", "fsdp", "to-torchtitan"),
    "from-dcp": ("from-fsdp", "to-zero", "to-deepspeed"),
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
    "collect": ("combine",),
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
# Options of DeepSpeed's zero_to_fp32.py that are none of ckpt to-fp32.
_OF_ZERO_TO_FP32 = {
    "safe-serialization": "leave it out: safetensors is what ckpt to-fp32 writes, and --format bin "
    "the other",
}
# What other tools call options, by the option.
OPTIONS = {
    "world-size": (
        *("ranks", "num-ranks", "gpus", "num-gpus", "n-gpus", "ngpus", "nproc", "np", "world"),
        *("nproc-per-node", "num-processes", "target-world-size"),
    ),
    "stage": ("zero-stage", "zero"),
}
_OPTION_MEANINGS = {word: f"--{option}" for option, words in OPTIONS.items() for word in words}
_MEANINGS = {word: command for command, words in SYNONYMS.items() for word in words}


def unknown_command(word: str, short_helps: Mapping[str, str]) -> str:
    """The line for a word that is not a command, with the command that is meant, if that
    can be told. ``short_helps`` has what each command does by its name."""
    line = f"No such command {word!r}"
    key = word.lower().removesuffix(".py").replace("_", "-")
    if key in _IN_PYTHON:
        return f"{line}; {_IN_PYTHON[key]}."

    if key in _MEANINGS or key in short_helps:
        return f"{line}. Use {_described(_MEANINGS.get(key, key), short_helps)}"

    if "/" in word or os.sep in word or os.path.exists(word):
        from converters.words import shell_word

        return (
            f"{word} is a path, not a command; name a command first: ckpt show {shell_word(word)}"
        )

    matches = difflib.get_close_matches(key, [*short_helps, *_MEANINGS], cutoff=0.7)
    commands = list(dict.fromkeys(_MEANINGS.get(match, match) for match in matches))
    choices = " or ".join(f"ckpt {command}" for command in commands)
    return f"{line}. Did you mean {choices}?" if commands else f"{line}."


def meant_option(option: str) -> str | None:
    """The option that other tools call so; ``None`` where they call none of ours so."""
    return _OPTION_MEANINGS.get(_key(option))


def _key(option: str) -> str:
    return option.lstrip("-").replace("_", "-")


def unknown_option(message: str, option: str, command: str | None) -> str:
    """The line for an option that a command does not have, ``message``, and what to do
    where the option is one of DeepSpeed's script."""
    key = _key(option)
    remedy = _OF_ZERO_TO_FP32.get(key) if command == "to-fp32" else None
    return f"{message.rstrip('.')}; {remedy}." if remedy else message


def _described(command: str, short_helps: Mapping[str, str]) -> str:
    """A command and what it does, as the end of a sentence."""
    short_help = short_helps.get(command, "")
    if not short_help:
        return f"ckpt {command}."
    return f"ckpt {command}: {short_help[0].lower()}{short_help[1:]}"
