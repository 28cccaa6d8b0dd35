"""The verdict where config.json names no class of the table."""

from __future__ import annotations

from ckpt.weights.reader import table
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.verdict import LoadVerdict
from converters.words import counted, some


def verdict(names: list[str], audience: Audience) -> LoadVerdict:
    """The verdict where no class of the table is known."""
    beside = audience.beside
    if beside is not None:
        fit = beside.fit(names)
        if fit.exact:
            return LoadVerdict(f"has the names of {beside.name}: {counted(len(names), 'name')}")

    reason = _why(audience)
    if beside is None or audience.custom:
        return LoadVerdict(f"not checked: {reason}")

    note = (
        f"{beside.name} beside the checkpoint has other names: {some(fit.missing)}; "
        f"here are {some(fit.unexpected)}"
        if fit.missing and fit.unexpected
        else None
    )

    return LoadVerdict(f"not checked: {reason}", notes=(note,) if note else ())


def _why(audience: Audience) -> str:
    if audience.config is None:
        return "no config.json, so no reader is known"
    if audience.custom:
        return "custom code (auto_map) is not run"
    if audience.architecture is None:
        return "config.json names no architecture"

    reader = table.reader_of(audience.architecture)
    if reader is not None and (part := reader.foreign_part(audience.config)):
        return f"{audience.architecture} with {part} inside is not in the table"

    return f"{audience.architecture} is not in the table (transformers {table.version()})"
