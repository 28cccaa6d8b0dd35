"""How every command that plans first goes on: dry run, bar, JSON and messages.

    plan  --dry-run-->  preview, printed
          ----------->  execute under a bar of bytes; the result, printed

A result is printed as JSON or for a reader, never both. stdout is data, stderr is talk.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.errors import one_line
from converters.words import counted

if TYPE_CHECKING:
    from ckpt.folders.staging import Continuation
    from ckpt.shares.company import Company
    from ckpt.shares.division import Divisible, Division
    from ckpt.shares.share_folder import SharedCommand
    from converters.execute.plan_shares import PlanShare
    from converters.execute.shares import ShareRecord

Progress = Callable[[int], Any]
# of several processes that do the same, whether another one prints for all
_is_silent: ContextVar[bool] = ContextVar("is_silent", default=False)


@dataclass(frozen=True, slots=True)
class Output:
    """The result and the lines that a command prints.

    ``result`` is a dataclass for ``--json``. ``lines`` go to stdout and ``notices`` to
    stderr for a reader. ``exit_code`` is 1 where something is not as it should be.
    """

    result: object
    lines: Iterable[object] = ()
    notices: Iterable[str] = ()
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A command's work, planned: what it would do, and how it is done.

    ``nbytes`` is how many bytes ``execute`` reports, ``title`` what the bar is called;
    ``None`` where there is nothing to wait for. ``opening`` is what a reader should know
    before it begins, ``interruption`` what an interrupted one leaves: sentences, or
    ``None``. ``divisible`` is how several processes do it, where they can.
    """

    preview: Callable[[], Output]
    execute: Callable[[Progress], Output]
    nbytes: int | None = None
    title: str = ""
    opening: Callable[[], str | None] = lambda: None
    interruption: Callable[[], str | None] = lambda: None
    divisible: Callable[[], Divisible] | None = None


@dataclass(frozen=True, slots=True)
class Invocation:
    """How ``ckpt`` was called: its arguments, and with ``ckpt join`` the output whose
    shares are joined."""

    arguments: tuple[str, ...]
    joined_output: Path | None = None


class Interruption(KeyboardInterrupt):
    """An interruption that says what it leaves, as a sentence."""


def opening_once(command: Callable[..., None]) -> Callable[..., None]:
    """A command in which each file of a checkpoint is opened and parsed once."""

    @wraps(command)
    def opening_files_once(*arguments: Any, **options: Any) -> None:
        from converters.storage import open_files  # which a help page need not load

        with open_files.once():
            command(*arguments, **options)

    return opening_files_once


def run(
    planned: Planned, *, dry_run: bool, as_json: bool, division: Division | None = None
) -> None:
    """Does what was planned, or with ``dry_run`` nothing, and prints the result.

    With a ``division`` it does what of it is this process's.
    """
    if division is not None:
        _run_divided(planned, division, dry_run=dry_run, as_json=as_json)
        return

    if dry_run:
        show(planned.preview(), as_json)
        return

    if not as_json and (opening := planned.opening()) is not None:
        say(opening)

    try:
        with progress(planned.nbytes, planned.title) as advance:
            output = planned.execute(advance)
    except KeyboardInterrupt as error:
        sentence = planned.interruption()
        raise error if sentence is None else Interruption(sentence) from error
    show(output, as_json)


def _run_divided(planned: Planned, division: Division, *, dry_run: bool, as_json: bool) -> None:
    """Does what of a command is this process's, and prints what is to be printed."""
    assert planned.divisible is not None
    divisible, company, share = planned.divisible(), division.company, division.share
    if company is not None:
        company.require_same(divisible.plan.digest())

    if dry_run:
        output = planned.preview()
        if division.output is not None:
            divisible.require_joinable(division.output)
        show(output if share is None else _with_volumes(output, divisible, share), as_json)
    elif division.output is not None:
        show(divisible.joined(division.output), as_json)
    elif company is not None:
        joined_output = _run_together(planned, divisible, company, division.command)
        if joined_output is not None:
            show(joined_output, as_json)
    elif share is not None:
        try:
            with progress(divisible.nbytes_of(share), f"{planned.title} {share}") as advance:
                record = divisible.write_share(share, advance, division.command)
        except KeyboardInterrupt as error:
            raise Interruption("the same command continues this share") from error
        show(_output_of_share(divisible, record), as_json)


def _run_together(
    planned: Planned, divisible: Divisible, company: Company, command: SharedCommand | None
) -> Output | None:
    """Does this process's share, beside the others; the first one joins them."""
    output = None
    with company.step():
        if company.is_first:
            present_count = divisible.prepare(company.share.count, command)
            if present_count:
                say(f"continuing: {counted(present_count, 'share')} are there")

    total = planned.nbytes if company.is_first and sys.stderr.isatty() else None
    with progress(total, planned.title) as advance:
        with company.step(), company.showing(advance if total is not None else None):
            divisible.write_share(company.share, company.progress, command)
        with company.step():
            if company.is_first:
                output = divisible.join(company.share.count)
    return output


def _with_volumes(output: Output, divisible: Divisible, share: PlanShare) -> Output:
    """The output of a dry run with what each process reads and writes."""
    from ckpt.results import ShareEntry
    from ckpt.text import size

    volumes = list(divisible.volumes(share.count))
    entries = tuple(
        ShareEntry(volume.share.number, volume.read_bytes, volume.write_bytes) for volume in volumes
    )
    lines = [
        f"{volume.share.words}\treads {size(volume.read_bytes)}\twrites {size(volume.write_bytes)}"
        for volume in volumes
    ]
    result: Any = output.result
    return replace(output, result=replace(result, shares=entries), lines=[*output.lines, *lines])


def _output_of_share(divisible: Divisible, record: ShareRecord) -> Output:
    """The output of a command that wrote one share."""
    from ckpt.cli.results.shares import ShareResult
    from ckpt.text import size
    from converters.words import shell_word, some

    share, place = record.share, divisible.output
    missing_numbers = divisible.missing_numbers(share.count)
    result = ShareResult(
        output=place,
        share=share.number,
        share_count=share.count,
        read_bytes=record.read_bytes,
        write_bytes=record.written_bytes,
        missing_shares=tuple(missing_numbers),
    )
    names = some(f"{number}/{share.count}" for number in missing_numbers)
    way_on = f"all are there: ckpt join {shell_word(place)}"
    line = f"{share.words} of {place}: {size(record.written_bytes)} written"
    return Output(result, lines=[line], notices=[f"missing yet: {names}" if names else way_on])


def divided(command: Callable[..., None]) -> Callable[..., None]:
    """A command that several processes can do, each its share; it is given a ``division``."""

    @wraps(command)
    def running_in_shares(*arguments: Any, share: PlanShare | None, **options: Any) -> None:
        context = click.get_current_context()
        division = _division(f"ckpt {context.info_name}", share, context.find_root().obj)
        if division is None:
            command(*arguments, division=None, **options)
            return

        token = _is_silent.set(not division.speaks)
        try:
            with division.reporting():
                command(*arguments, division=division, **options)
        finally:
            _is_silent.reset(token)

    return running_in_shares


def launched(command: Callable[..., None]) -> Callable[..., None]:
    """A command that several processes of a launcher can do; it is given a ``division``."""
    return wraps(command)(partial(divided(command), share=None))


def _division(what: str, share: PlanShare | None, invocation: Any) -> Division | None:
    """The division that an option, ``ckpt join`` or a launcher asks for."""
    from ckpt.shares import SIGNS

    is_joining = isinstance(invocation, Invocation) and invocation.joined_output is not None
    if share is None and not is_joining and not any(sign in os.environ for sign in SIGNS):
        return None

    from ckpt.shares import division

    arguments = invocation.arguments if isinstance(invocation, Invocation) else ()
    if isinstance(invocation, Invocation) and invocation.joined_output is not None:
        return division.Division(output=invocation.joined_output)
    if share is not None:
        return division.of_share(share, arguments)
    return division.of_launch(what, arguments)


def opening(continuation: Continuation | None) -> str | None:
    """That a command goes on with what an interrupted one left."""
    return None if continuation is None else f"continuing: {continuation.sentence}, checking them"


def interruption(continuation: Continuation | None) -> str:
    """Whether the same command goes on after an interruption."""
    if continuation is None:
        return "nothing is left of the output; the same command starts over"
    return f"{continuation.sentence}; the same command continues where it stopped"


def unfitting(output: Output, shortage: str | None) -> Output:
    """The output of a dry run; exit code 1,
    and a note, where what it plans does not fit."""
    if shortage is None:
        return output
    notes = (*getattr(output.result, "notes", ()), shortage)
    result: Any = output.result
    return replace(
        output,
        result=replace(result, notes=notes),
        notices=[*output.notices, f"ckpt: {shortage}"],
        exit_code=1,
    )


def show(output: Output, as_json: bool) -> None:
    """Prints an output; exits with its code if that is not 0."""
    if _is_silent.get():
        pass
    elif as_json:
        click.echo(as_text(output.result))
    else:
        for line in output.lines:
            click.echo("\t".join(map(one_line, str(line).split("\t"))))
        for notice in output.notices:
            click.echo(one_line(notice), err=True)

    if output.exit_code:
        sys.exit(output.exit_code)


def say(sentence: object) -> None:
    """Prints a line on stderr, in which no name that came from a disk breaks it."""
    if not _is_silent.get():
        click.echo(f"ckpt: {one_line(sentence)}", err=True)


def as_text(result: object) -> str:
    """A result as the text of a JSON document."""
    from ckpt import results
    from converters.storage import bounded_json

    return bounded_json.dumps(results.document(result)).decode().rstrip("\n")


@contextmanager
def progress(total: int | None, title: str, unit: str = "B") -> Iterator[Progress]:
    """A bar of bytes, or of things that ``unit`` names, on a terminal; nothing
    elsewhere, or without a total."""
    if total is None or not sys.stderr.isatty():
        yield lambda _: None
        return

    from tqdm import tqdm

    with tqdm(
        total=total, desc=one_line(title), unit=unit, unit_scale=unit == "B", leave=False
    ) as bar:
        yield bar.update


class _Announcer(logging.Handler):
    """Prints what the library logs, as a line of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def announcements(as_json: bool) -> Iterator[None]:
    """A block in which warnings of the library are lines on stderr;
    not so with ``as_json``."""
    logger = logging.getLogger("ckpt")
    handler = logging.NullHandler() if as_json else _Announcer()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
