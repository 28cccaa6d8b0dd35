"""Arguments of functions for users: element types, sizes, and errors that name arguments.

What is wrong is said once, with the options of commands. A function for users names its
own arguments instead (``naming_arguments``); the command line prints the first form
(``CheckpointError.for_command``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from ckpt.weights.request import DTYPE_NAMES, DTYPES
from converters.errors import CheckpointError, Kind
from converters.plan import parse_size

# Values that are words of an option, as messages have them: --weights 16bit.
_CHOICES = {
    "check": ("auto", "names", "none", "transformers"),
    "dtype": ("bf16", "fp16", "fp32", "keep"),
    "format": ("bin", "lightning", "safetensors"),
    "layout": ("hub", "runtime"),
    "names": ("as-stored", "hf", "reader"),
    "odd-types": ("raw", "skip"),
    "tied": ("drop", "keep"),
    "weights": ("16bit", "fp32"),
}
_WORDS = sorted({word for words in _CHOICES.values() for word in words})
# A command that is named, with all of its options; or an option, and the placeholder, the word or
# the path that is its value: --tag TAG.
_OPTION = re.compile(
    r"(?P<command>(?<![\w/.-])ckpt (?:[a-z]+-)?[a-z0-9]+(?: [^\s;,:()]+)*? --[^;,:()]*)"
    r"|(?<![\w/-])(?:--(?P<option>[a-z][a-z0-9-]*)|-(?P<letter>o)\b(?!-))"
    rf"(?: (?P<value>[A-Z]+(?:=[A-Z]+)?|{'|'.join(_WORDS)}|[^\s;,]*/[^\s;,]*)(?![\w-]))?"
)
_LETTERS = {"o": "output"}


@contextmanager
def naming_arguments(*arguments: str, **values: str) -> Iterator[None]:
    """Errors in this block name ``arguments``, such as ``tag=``, instead of options.

    A flag is given with its value: ``overwrite=True`` stands for ``--overwrite``,
    ``verify=False`` for ``--no-verify``. ``values`` says how an argument is spelled that
    has another name than the option, such as ``names="Naming(as_stored=True)"``. Other
    options are those of ``ckpt to-fp32``.
    """
    try:
        yield
    except CheckpointError as error:
        spellings = {_option(argument): argument for argument in arguments}
        spellings |= {name.replace("_", "-"): spelling for name, spelling in values.items()}
        # of functions that call each other the outermost one is the user's
        message = _OPTION.sub(lambda match: _spoken(match, spellings), error.for_command)
        error.args = (message,)
        raise


def dtype_name(dtype: object) -> str:
    """The key of ``DTYPES`` for an element type, under any name that torch or users have for it.

    "bfloat16", "torch.bfloat16" and ``torch.bfloat16`` are "bf16". ``CheckpointError``
    (refused) for anything else.
    """
    name = known_dtype(dtype)
    if name is None:
        choices = ", ".join(map(repr, DTYPES))
        raise CheckpointError(
            f"dtype is {str(dtype)!r}; expected one of {choices}, or a name that torch has for it, "
            "such as 'float32', 'bfloat16' and 'float16'",
            "refused",
        )

    return name


def known_dtype(dtype: object) -> str | None:
    """The key of ``DTYPES`` for an element type; ``None`` for what is not a type to write."""
    return DTYPE_NAMES.get(str(dtype).removeprefix("torch.").lower())


def require_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """``CheckpointError`` for an argument that is none of some values."""
    values = list(choices)
    if value not in values:
        texts = ", ".join(repr(choice) for choice in values)
        raise CheckpointError(f"{argument} is {value!r}; expected one of {texts}", "refused")


def shard_bytes(size: int | str, kind: Kind) -> int:
    """Bytes of ``max_shard_size``, given as a number or as "5GB"; an error of ``kind``."""
    try:
        return parse_size(size)
    except ValueError as error:
        raise CheckpointError(f"max_shard_size: {error}", kind) from error


def _option(argument: str) -> str:
    name, _, value = argument.partition("=")
    return ("no-" if value == "False" else "") + name.replace("_", "-")


def _spoken(match: re.Match[str], spellings: Mapping[str, str]) -> str:
    if match["command"]:
        return match[0]

    option = match["option"] or _LETTERS[match["letter"]]
    argument = spellings.get(option)
    if argument is None:
        return f"ckpt to-fp32 {match[0]}"

    value = match["value"]
    if not value:
        return argument

    is_next_word = value in _WORDS and value not in _CHOICES.get(option, ())
    if argument.endswith(")"):  # it has the value
        return argument
    if is_next_word or not argument.endswith("="):
        return f"{argument} {value}"

    return f"{argument}{value}" if value.isupper() and value.isalpha() else f'{argument}"{value}"'
