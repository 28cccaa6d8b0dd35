"""JSON from files that others wrote:
as strict as safetensors reads it, and bounded in memory.

``json`` takes the last of two equal names, NaN, and nests as deep as the stack; a header
of 100 MB becomes gigabytes of lists. So objects are counted before any is made.
"""

from __future__ import annotations

import json
from typing import Any

from converters.storage import misplaced_files

MAX_OBJECTS = 1 << 20  # lists and objects: three for each tensor of a header
MAX_VALUES = 1 << 22


def loads(data: bytes, text: str | None = None, infinite: bool = False) -> Any:
    """The value in ``data``, which is UTF-8 unless ``text`` is what it decodes to.

    ``infinite`` reads NaN, Infinity and -Infinity too, as Python's ``json`` writes them.
    ``ValueError`` for anything else: names that stand twice, numbers over 4300 digits,
    more than ``MAX_OBJECTS`` lists and objects, or more than ``MAX_VALUES`` values.
    """
    containers, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    if containers > MAX_OBJECTS or values > MAX_VALUES:
        raise ValueError(f"{containers} lists and objects of {values} values: more than is read")

    try:
        return json.loads(
            data.decode() if text is None else text,
            object_pairs_hook=_unique_names,
            parse_constant=float if infinite else _no_constant,
        )
    except RecursionError as error:
        raise ValueError("its lists nest too deep") from error
    except ValueError as error:
        if (explanation := misplaced_files.content(data[:128])) is not None:
            raise ValueError(f"it {explanation}") from error
        raise ValueError(fault(error)) from error


def fault(error: ValueError) -> str:
    """Why a text is not JSON, in words for whoever does not know the parser."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if not error.doc.strip():
        return "it is empty"
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        return "it ends too early"

    return f"unexpected character at line {error.lineno}, column {error.colno}"


def dumps(content: Any, sort_keys: bool = False) -> bytes:
    """The text of a small file: indented UTF-8, in which lone surrogates are escaped."""
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return (json.dumps(content, indent=2, sort_keys=sort_keys) + "\n").encode()


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name stands in it twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
