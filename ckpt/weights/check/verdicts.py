"""From how names fit a class to the verdict on an output, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt.weights.reader import table
from ckpt.weights.reader.audience import MAX_MISSING_SHARE, Audience, Match
from ckpt.weights.reader.fit import Fit
from ckpt.weights.reader.fitting import TooManyNames
from ckpt.weights.reader.table import Reader
from ckpt.weights.reader.verdict import LoadVerdict
from converters.words import counted, some, verb

if TYPE_CHECKING:
    from ckpt.weights.reader.losses import Loss

# Missing names that are too many for a table that lacks a few: of all that the reader
# wants.
_SUBSTANTIAL = 0.1  # where other names are there that it does not know
_NEW = 0.35  # that a newer transformers may have renamed


def loads(match: Match, names: list[str], audience: Audience) -> LoadVerdict:
    """The verdict on names that fit, with which of the two forms of names they are."""
    reader, fit = match.reader, match.fit
    if fit.missing:
        return left_out(reader.name, fit)

    line = f"loads as {reader.name}: {fit.present:,} of {fit.required:,} names"
    if fit.is_renamed:
        line += (
            "; from_pretrained renames these as it reads them; save_pretrained, vLLM and "
            "llama.cpp use other names"
        )
        return LoadVerdict(line, reader=reader.name, loads=True, has_kinds=fit.has_kinds)

    foreign = _foreign_to_hub(reader, names, audience) if reader.hub != reader.memory else 0
    if foreign:
        version = table.version().partition(".")[0]
        line += (
            f"; these are the names that transformers {version} runs with; "
            "save_pretrained and transformers 4, vLLM, llama.cpp use others "
            f"({foreign} of {len(names)})"
        )

    return LoadVerdict(line, reader=reader.name, loads=True, has_kinds=fit.has_kinds)


def asked_line(reader: str, release: str, fit: Fit, missing: list[str]) -> str:
    """The verdict in a line, where the installed transformers was asked."""
    in_part = " in part" if missing else ""
    count = f"{fit.present:,} of {fit.required:,} names and shapes"
    return f"loads as {reader} of {release}{in_part}: {count}"


def left_out(reader: str, fit: Fit) -> LoadVerdict:
    """The verdict on a part of a model, where somebody asked for no more: alone it does
    not load."""
    return LoadVerdict(
        f"does not load alone: {fit.present:,} of {fit.required:,} names of {reader}; "
        f"from_pretrained would initialize {some(fit.missing)} at random; load these weights into "
        "a model that has the others: model.load_state_dict(..., strict=False)",
        reader=reader,
        loads=False,
        missing=tuple(fit.missing),
        unexpected=tuple(fit.unexpected),
    )


def loads_as_other(
    better: Match, stated: Match, names: list[str], missing: list[str], audience: Audience
) -> LoadVerdict:
    """The verdict by another class than the one that config.json names."""
    verdict = loads(better, names, audience)
    return replace(verdict, notes=(other_note(better, stated, missing), *verdict.notes))


def other_note(better: Match, stated: Match, missing: list[str]) -> str:
    """Why the class that config.json names is not the one that the names are of."""
    if missing:
        problem = f"would lack {some(missing)}"
    else:
        problem = f"does not know {some(stated.fit.unexpected)}"
    return (
        f"these are the names of {better.reader.name}; {stated.reader.name}, which "
        f"config.json names, {problem}"
    )


def _foreign_to_hub(reader: Reader, names: list[str], audience: Audience) -> int:
    assert audience.config is not None
    try:
        return len(reader.fit_of(reader.hub, names, audience.config).unexpected)
    except TooManyNames:
        return 0


def partial(
    reader: str,
    fit: Fit,
    missing: list[str],
    loss: Loss,
    audience: Audience,
    remedy: str,
) -> LoadVerdict:
    """The verdict on names that do not fit: an error where much is amiss, else notes.

    ``remedy`` says whom else to ask; it is empty where transformers itself was asked.
    """
    share = len(missing) / max(fit.required, 1)
    lacks_layers = bool(set(missing).intersection(fit.lost_members))
    is_much = share > (_SUBSTANTIAL if fit.unexpected else MAX_MISSING_SHARE) or loss.substantial
    if is_much or lacks_layers or _share(fit.empty, missing, fit) > _SUBSTANTIAL:
        if (
            remedy
            and audience.newer
            and share < _NEW
            and not fit.highest_numbers
            and not lacks_layers
        ):
            return LoadVerdict(
                "not checked: config.json is of a newer transformers "
                f"({audience.newer}) than the table ({table.version()}); by this table "
                f"{len(missing):,} names are missing and {len(fit.unexpected):,} are "
                "not read"
            )

        from ckpt.weights.check import refusals

        raise refusals.unloadable(reader, fit, missing, loss, audience, remedy)

    if fit.missing and not missing:
        return left_out(reader, fit)

    in_part = " in part" if missing else ""
    line = f"loads as {reader}{in_part}: {fit.present:,} of {fit.required:,} names"
    if loss.names:
        number = len(fit.unexpected)
        line += f"; {counted(number, 'tensor')} {verb(number, 'is', 'are')} not read"

    notes = tuple(_partial_notes(reader, fit, missing, loss, audience))
    return LoadVerdict(
        line,
        reader=reader,
        loads=not missing,
        missing=tuple(missing),
        unexpected=tuple(fit.unexpected),
        notes=notes,
    )


def _partial_notes(
    reader: str, fit: Fit, missing: list[str], loss: Loss, audience: Audience
) -> Iterator[str]:
    """Notes on an output that its reader loads but for a few names."""
    if missing:
        reason = f" ({loss.reason})" if loss.reason else ""
        yield (
            f"{reader} would initialize {some(missing)}, which this checkpoint does "
            f"not have{reason}"
        )
    if fit.unexpected:
        yield f"{reader} does not read {some(fit.unexpected)}"
    if missing and audience.beside is not None:
        yield f"{audience.beside.name} beside the checkpoint has other names, too"


def _share(names: list[str], missing: list[str], fit: Fit) -> float:
    """How much of what the reader wants those of some names are that are missing."""
    return len(set(names).intersection(missing)) / max(fit.required, 1)
