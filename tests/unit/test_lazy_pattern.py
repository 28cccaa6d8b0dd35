"""Expressions that are compiled when they are used match as those of ``re`` do."""

from __future__ import annotations

import re

import pytest

from converters.lazy_pattern import LazyPattern

TEXT = "layer_3.pt and LAYER_12.pt"


@pytest.mark.parametrize("flags", [0, re.IGNORECASE])
@pytest.mark.parametrize("pattern", [r"(layer)_(\d+)", r"\.pt", r".*", r"none"])
def test_every_method_answers_as_that_of_re(pattern: str, flags: int) -> None:
    lazy, eager = LazyPattern(pattern, flags), re.compile(pattern, flags)

    for method in ("match", "fullmatch", "search"):
        lazy_match, match = getattr(lazy, method)(TEXT), getattr(eager, method)(TEXT)
        assert (lazy_match and lazy_match.groups()) == (match and match.groups())
        assert (lazy_match and lazy_match.span()) == (match and match.span())
    assert [match.span() for match in lazy.finditer(TEXT)] == [
        match.span() for match in eager.finditer(TEXT)
    ]
    assert lazy.split(TEXT) == eager.split(TEXT)
    assert lazy.sub("-", TEXT) == eager.sub("-", TEXT)
    assert lazy.pattern == pattern


def test_bytes_are_matched_too() -> None:
    match = LazyPattern(rb"\d+").search(TEXT.encode())
    assert match is not None
    assert match[0] == b"3"


def test_an_expression_is_compiled_once_and_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []
    compile_pattern = re.compile

    def recorded(pattern: str, flags: int = 0) -> re.Pattern[str]:
        compiled.append(pattern)
        return compile_pattern(pattern, flags)

    monkeypatch.setattr(re, "compile", recorded)
    pattern = LazyPattern("x")
    assert compiled == []

    assert pattern.search("axb") is not None
    assert pattern.search("abc") is None
    assert compiled == ["x"]
