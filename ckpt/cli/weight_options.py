"""The options of ``ckpt to-fp32`` and ``ckpt push`` that say which weights,
under which names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt.cli.options import LOCAL_PATH

if TYPE_CHECKING:
    from ckpt.weights.request import Request

F = TypeVar("F", bound=Callable[..., Any])
_PATH = LOCAL_PATH


def _pairs(_ctx: Any, _param: Any, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    from ckpt.weights.request import FILE_SUFFIXES, pairs_of_file

    pairs: list[tuple[str, str]] = []
    for value in values:
        if value.endswith(FILE_SUFFIXES):
            pairs += pairs_of_file(Path(value))
            continue
        pattern, separator, replacement = value.rpartition("=")
        if not separator:
            raise click.BadParameter(f"{value!r} has no =; write OLD=NEW")
        try:
            re.compile(pattern)
        except re.error as error:
            raise click.BadParameter(f"{pattern!r} is not a regular expression: {error}") from error

        pairs.append((pattern, replacement))

    return tuple(pairs)


def _merging(_ctx: Any, _param: Any, merge: bool) -> bool:
    """Before anything loads numpy: merged models have the bits that PEFT's have."""
    if merge:
        from converters.computing import blas

        blas.prefer()
    return merge


TP_RULES = click.option(
    "--tp-rules",
    metavar="FILE",
    type=_PATH,
    help="How parameters were cut for tensor parallelism, where the checkpoint does not say it: a "
    "file (TOML or JSON), or megatron-gpt, gpt-neox or llama.",
)
OPTIONS = (
    click.option(
        "--weights",
        type=click.Choice(["fp32", "16bit"]),
        default="fp32",
        show_default=True,
        help="The optimizer's fp32 weights, or the 16-bit weights that the model computes with.",
    ),
    click.option(
        "--names",
        type=click.Choice(["reader", "as-stored", "hf"]),
        default="reader",
        show_default=True,
        help="The names that the model's reader knows, or those in the checkpoint (no config.json "
        "is written then). hf: those of transformers for the names of a pipeline, of Megatron or "
        "of AutoEP.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["hub", "runtime"]),
        default="hub",
        show_default=True,
        help="The names and shapes that save_pretrained writes and every reader of the Hub knows, "
        "or those of the running model, which transformers 5 reads too. They differ for mixtures "
        "of experts and models of images.",
    ),
    click.option(
        "--part",
        metavar="NAME",
        help="The model (policy) or the adapter to write, where several are saved as one.",
    ),
    click.option(
        "--exclude-frozen",
        is_flag=True,
        help="Leave out the parameters that are not trained.",
    ),
    TP_RULES,
    click.option("--strip", metavar="PREFIX", multiple=True, help="Drop a prefix of the names."),
    click.option(
        "--rename",
        metavar="OLD=NEW",
        multiple=True,
        callback=_pairs,
        help="Rename by a regular expression, such as '^encoder\\.=model.', or by those of a "
        ".toml or .json file.",
    ),
    click.option(
        "--select",
        metavar="GLOB",
        multiple=True,
        help="Write only the tensors of these names.",
    ),
    click.option(
        "--merge",
        is_flag=True,
        callback=_merging,
        help="Write the model with its adapter merged in.",
    ),
    click.option(
        "--base",
        metavar="MODEL",
        type=_PATH,
        help="The folder of the base model, for --merge.",
    ),
    click.option(
        "--other-base",
        is_flag=True,
        help="Merge into --base even if its values are unlike the checkpoint's copy of it.",
    ),
    click.option(
        "--adapter-config",
        metavar="FILE",
        type=_PATH,
        help="The adapter_config.json of the training, where the checkpoint has none.",
    ),
    click.option(
        "--config",
        metavar="PATH",
        type=_PATH,
        help="The config.json (or its folder) to write, where the checkpoint has none.",
    ),
    click.option(
        "--tokenizer",
        metavar="DIR",
        type=_PATH,
        help="A folder to take the tokenizer from.",
    ),
    click.option(
        "--dequantize",
        is_flag=True,
        help="Write quantized weights as floating-point numbers.",
    ),
    click.option(
        "--check",
        type=click.Choice(["auto", "names", "transformers", "none"]),
        default="auto",
        show_default=True,
        help="How to check that the output loads: by its names, by building the model with the "
        "installed transformers, or by the latter only where the names do not fit (auto).",
    ),
    click.option(
        "--untie",
        is_flag=True,
        help="Write tie_word_embeddings: false, so that a reader takes both of two tied tensors.",
    ),
    click.option(
        "--odd-types",
        type=click.Choice(["skip", "raw"]),
        default="skip",
        show_default=True,
        help="Tensors of an element type that safetensors lacks: leave them out, or copy their "
        "bytes.",
    ),
)


def weights_options(command: F) -> F:
    """Adds the options to a command; they arrive as keyword arguments (``request``)."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def request(options: dict[str, Any]) -> Request:
    """Takes the options out of a command's keyword arguments."""
    from ckpt.weights.request import Naming, Request

    naming = Naming(
        options.pop("part"),
        options.pop("strip"),
        options.pop("rename"),
        options.pop("select"),
    ).with_names(options.pop("names"))

    names = (
        *(
            "weights",
            "merge",
            "base",
            "adapter_config",
            "config",
            "tokenizer",
            "dequantize",
        ),
        *("check", "untie", "other_base", "exclude_frozen", "layout", "tp_rules"),
    )

    return Request(
        naming,
        unsupported_types=options.pop("odd_types"),
        **{option_name: options.pop(option_name) for option_name in names},
    )
