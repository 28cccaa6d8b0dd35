"""What the commands share: options, JSON, and a bar of bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ckpt.runs.retention import Best

CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
RUN = click.argument("run", type=click.Path(path_type=Path))
TAG = click.option("--tag", help="The tag to read. Default: what the file latest names.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")

DTYPE = click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "keep"]),
    default="fp32",
    show_default=True,
    help="Type of the parameters; keep: each as it is stored. Buffers keep theirs.",
)


def _size(_ctx: Any, _param: Any, value: str) -> int:
    from converters.plan import parse_size

    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


MAX_SHARD_SIZE = click.option(
    "--max-shard-size",
    metavar="SIZE",
    callback=_size,
    default="5GB",
    show_default=True,
    help="5GB (10^9 bytes), 500MB, 2GiB.",
)


def best_of(_ctx: Any, _param: Any, value: str | None) -> Best | None:
    """The callback of an option that names a metric, such as ``eval_loss:min``."""
    from ckpt.runs.retention import Retention

    try:
        return None if value is None else Retention.best_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def facts_as_json(facts: Any) -> str:
    """Facts as text."""
    return json.dumps(facts, indent=2, ensure_ascii=False)


@contextmanager
def progress(total: int, name: str) -> Iterator[Callable[[int], Any]]:
    """A bar of bytes on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
