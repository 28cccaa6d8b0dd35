"""The table of docs/json.md, and whether what a command prints is in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oracles import ROOT

from ckpt import results


@dataclass(frozen=True)
class Row:
    """A row of the table in docs/json.md."""

    kinds: frozenset[str]
    commands: frozenset[str]


def table() -> dict[str, Row]:
    """The table of docs/json.md by key."""
    rows = {}
    for line in (ROOT / "docs/json.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 5:
            key, kinds, _, meaning, commands = cells
            assert meaning, key
            name = key.strip("`")
            assert name not in rows, f"{name} stands twice in docs/json.md"
            rows[name] = Row(frozenset(kinds.split(" or ")), frozenset(commands.split(", ")))
    return rows


def printed(content: Any, rows: dict[str, Row]) -> Iterator[tuple[str, Any]]:
    """Every key that is printed; the keys of a map are names of things."""
    if isinstance(content, list):
        for each in content:
            yield from printed(each, rows)
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            is_map = key in rows and rows[key].kinds == {"map"}
            yield from printed(list(value.values()) if is_map and value else value, rows)


def is_of(value: Any, name: str) -> bool:
    """Whether a value is of the type that the table names."""
    kinds = {
        "text": str,
        "list": list,
        "map": dict,
        "object": dict,
        "number": (int, float),
        "true, false": bool,
    }
    return value is None or isinstance(value, kinds[name])


def require_documented(command: str, document: dict[str, Any]) -> None:
    """Fails where a key of a printed document is not in the table for this command."""
    rows = table()
    assert document.pop("schema") == results.SCHEMA and document.pop("ckpt")
    pairs = list(printed(document, rows))
    assert len(pairs) > 2
    for key, value in pairs:
        assert command in rows[key].commands, key
        (name,) = rows[key].kinds
        assert is_of(value, name), (key, value)
