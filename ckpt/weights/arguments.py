"""Arguments of functions for users: element types, sizes,
and messages that name arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ckpt.weights.request import DTYPE_NAMES, DTYPES
from converters import options
from converters.errors import CheckpointError, Kind
from converters.plan import parse_size


@contextmanager
def naming_arguments(*arguments: str, **values: str) -> Iterator[None]:
    """Messages in this block name ``arguments``, such as ``tag=``, instead of options.

    A flag is given with its value: ``overwrite=True`` stands for ``--overwrite``,
    ``verify=False`` for ``--no-verify``. ``values`` says how an argument is spelled that
    has another name than the option, such as ``names="Naming(as_stored=True)"``.
    """
    spellings = {_option(argument): argument for argument in arguments}
    spellings |= {name.replace("_", "-"): spelling for name, spelling in values.items()}
    with options.using(options.of_functions(spellings)):
        yield


def dtype_name(dtype: object) -> str:
    """The key of ``DTYPES`` for an element type,
    under any name that torch or users have for it.

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
    """The key of ``DTYPES`` for an element type;
    ``None`` for what is not a type to write."""
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
