"""How every command that plans first goes on: dry run, bar, JSON and messages.

    plan  --dry-run-->  preview, printed
          ----------->  execute under a bar of bytes; the result, printed

A result is printed as JSON or for a reader, never both. stdout is data, stderr is talk.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from converters.errors import one_line

if TYPE_CHECKING:
    from ckpt.folders.staging import Continuation

Progress = Callable[[int], Any]


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
    ``None``.
    """

    preview: Callable[[], Output]
    execute: Callable[[Progress], Output]
    nbytes: int | None = None
    title: str = ""
    opening: Callable[[], str | None] = lambda: None
    interruption: Callable[[], str | None] = lambda: None


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


def run(planned: Planned, *, dry_run: bool, as_json: bool) -> None:
    """Does what was planned, or with ``dry_run`` nothing, and prints the result."""
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
    if as_json:
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
