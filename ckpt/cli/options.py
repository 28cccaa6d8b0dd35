"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ckpt.runs.retention import Best
    from converters.execute.plan_shares import PlanShare

F = TypeVar("F", bound=Callable[..., Any])


class LocalPath(click.Path):
    """A path of this machine. A URL is an error:
    ``Path`` would make a folder "s3:" of it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; ``CheckpointError`` for a URL."""
        from converters.storage.store import local_path

        return local_path(value)


class OutputPath(click.Path):
    """A path of this machine that is written to."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; ``CheckpointError`` for a URL."""
        from converters.storage.store import output_path

        return output_path(value)


class SourcePath(click.Path):
    """A path to read a checkpoint from, or a URL of a store that there is."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; ``CheckpointError`` for a URL that no store keeps."""
        from converters.storage.stores import source_path

        return source_path(value)


LOCAL_PATH = LocalPath()
OUTPUT_PATH = OutputPath()
CHECKPOINT = click.argument("checkpoint", type=SourcePath())
LOCAL_CHECKPOINT = click.argument("checkpoint", type=LOCAL_PATH)
RUN = click.argument("run", type=LOCAL_PATH)
TAG = click.option(
    "--tag", metavar="TAG", help="The tag to read. Default: what the file latest names."
)
LAST = click.option(
    "--last",
    is_flag=True,
    help="CHECKPOINT is a run: take its newest checkpoint that is committed or complete.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def dry_run(help_text: str) -> Callable[[F], F]:
    """The option ``--dry-run``; ``help_text`` says what is printed instead of done."""
    return click.option("--dry-run", is_flag=True, help=help_text)


class DtypeOption(click.Option):
    """An option of element types, under the names that torch and transformers have too."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """The value under its name in the help: bf16 for bfloat16."""
        from ckpt.weights.arguments import known_dtype

        return super().type_cast_value(ctx, known_dtype(value) or value)


DTYPE = click.option(
    "--dtype",
    cls=DtypeOption,
    type=click.Choice(["fp32", "bf16", "fp16", "keep"]),
    default="fp32",
    show_default=True,
    help="Type of the parameters; keep: each as it is stored. Buffers keep theirs.",
)


def _share(_ctx: Any, _param: Any, value: str | None) -> PlanShare | None:
    from converters.execute.plan_shares import parse

    try:
        return None if value is None else parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


SHARE = click.option(
    "--share",
    metavar="3/16",
    callback=_share,
    help="Write the third of 16 equal shares of the output, and no more; ckpt join makes the "
    "output of all of them. 1/1: alone, whatever started this process.",
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


def percentage(_ctx: Any, _param: Any, value: str | None) -> float | None:
    """The callback of an option that takes a part, such as ``5%``, in percent."""
    if value is None:
        return None

    try:
        percent = float(value.removesuffix("%"))
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a part in percent, such as 5%") from error
    if not 0 < percent <= 100:
        raise click.BadParameter(f"{value} is not between 0% and 100%")

    return percent


def checkpoint_of(path: Path, tag: str | None, last: bool, command: str) -> Path:
    """The path of the checkpoint: ``path`` itself,
    or with ``last`` the newest of the run there.

    Says on stderr which that is. ``CheckpointError`` for a run without ``last`` that no
    file latest leads on from; ``command`` is how the user called it, such as "ckpt
    to-fp32".
    """
    from ckpt.cli import planned
    from ckpt.runs.states import newest

    with planned.announcements(as_json=False):
        checkpoint, remark = newest.choose(path, tag, last, command)
    if remark is not None:
        planned.say(remark)

    return checkpoint
