"""Errors for Python callers: they name arguments where commands name options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from converters.errors import CheckpointError, Kind
from converters.plan import parse_size

# An option, not as part of a command that is named, and the placeholder of its value:
# --tag TAG.
_OPTION = re.compile(
    r"(?P<command>\bckpt [a-z][a-z0-9-]* (?:\S+ )?)?"
    r"(?<![\w/-])--(?P<option>[a-z][a-z0-9-]*)(?: (?P<value>[A-Z]+(?:=[A-Z]+)?)\b)?"
)


@contextmanager
def naming_arguments(*arguments: str) -> Iterator[None]:
    """Errors in this block name ``arguments``, such as ``tag=``, instead of options.

    A flag is given with its value: ``overwrite=True`` stands for ``--overwrite``,
    ``verify=False`` for ``--no-verify``. Other options are those of ``ckpt to-fp32``.
    """
    try:
        yield
    except CheckpointError as error:
        arguments_by_option = {_option(argument): argument for argument in arguments}
        error.args = (_OPTION.sub(lambda match: _spoken(match, arguments_by_option), str(error)),)
        raise


def shard_bytes(size: int | str, kind: Kind) -> int:
    """Bytes of ``max_shard_size``, given as a number or as "5GB"; an error of ``kind``."""
    try:
        return parse_size(size)
    except ValueError as error:
        raise CheckpointError(f"max_shard_size: {error}", kind) from error


def _option(argument: str) -> str:
    name, _, value = argument.partition("=")
    return ("no-" if value == "False" else "") + name.replace("_", "-")


def _spoken(match: re.Match[str], arguments_by_option: Mapping[str, str]) -> str:
    if match["command"]:
        return match[0]

    argument = arguments_by_option.get(match["option"])
    if argument is None:
        return f"ckpt to-fp32 {match[0]}"

    value = match["value"]
    if not value:
        return argument

    return f'{argument}"{value}"' if "=" in value else f"{argument}{value}"
