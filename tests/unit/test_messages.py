"""An error is one line: what is wrong and what to do stand in one sentence, parted by ";". Articles
go by the sound of what follows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from syntax_trees import nodes

from converters.words import with_article

MODULES = sorted(path for room in ("ckpt", "converters") for path in (ROOT / room).rglob("*.py"))
_SECOND_SENTENCE = re.compile(r"\w\. [A-Z][a-z]")


def _messages(path: Path) -> Iterator[str]:
    """The texts that errors of a module are made of, a name or a value in them as "x"."""
    for node in nodes(path):
        is_error = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")
        if is_error and node.args:
            parts = (part for part in ast.walk(node.args[0]) if isinstance(part, ast.JoinedStr))
            yield from (_text(part) for part in parts)
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def _text(joined: ast.JoinedStr) -> str:
    values = (value.value if isinstance(value, ast.Constant) else "x" for value in joined.values)
    return "".join(map(str, values))


def test_no_error_has_two_sentences() -> None:
    sentences = [
        f"{path}: {text}"
        for path in MODULES
        for text in _messages(path)
        if _SECOND_SENTENCE.search(text)
    ]
    assert sentences == []


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        *(("IA3", "an IA3"), ("LoRA", "a LoRA"), ("OFT", "an OFT"), ("HRA", "an HRA")),
        *(("FSDP checkpoint", "an FSDP checkpoint"), ("BOFT", "a BOFT"), ("VB-LoRA", "a VB-LoRA")),
        *(("adapter", "an adapter"), ("universal folder", "a universal folder")),
        *(("unfinished file", "an unfinished file"), ("uninitialized one", "an uninitialized one")),
        *(("int", "an int"), ("ndarray", "an ndarray"), ("UserDict", "a UserDict")),
        *(("one-time code", "a one-time code"), ("hour", "an hour"), ("NoneType", "a NoneType")),
    ],
)
def test_an_article_goes_by_the_sound(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


def _bare_articles(path: Path) -> Iterator[str]:
    """The f-strings of a module that write an article before a name or a value."""
    for node in nodes(path):
        if isinstance(node, ast.JoinedStr):
            pairs = zip(node.values, node.values[1:], strict=False)
            for text, value in pairs:
                is_text = isinstance(text, ast.Constant) and isinstance(value, ast.FormattedValue)
                if is_text and re.search(r"(^|[\s(])an? $", str(text.value), re.IGNORECASE):
                    yield ast.unparse(node)


def test_an_article_before_a_value_is_chosen_by_its_sound() -> None:
    """``converters.words.with_article`` chooses it."""
    assert [f"{path}: {text}" for path in MODULES for text in _bare_articles(path)] == []
