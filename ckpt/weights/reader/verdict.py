"""The verdict on an output: whether its reader loads it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True, slots=True)
class LoadVerdict:
    """Whether and how the reader loads the output.

    ``line`` is one sentence for the user. ``reader`` is the class that opens the output,
    such as ``LlamaForCausalLM``, or ``None`` if it is unknown. ``loads`` is ``None``
    where that was not checked. ``missing`` and ``unexpected`` are names, ``notes`` are
    for the user. ``failure`` says why the reader raises an error, if it does.
    ``has_kinds``: layers are of several kinds, and the table does not know which of them
    config.json wants where.
    """

    line: str
    _: KW_ONLY
    reader: str | None = None
    loads: bool | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str | None = None
    has_kinds: bool = False
