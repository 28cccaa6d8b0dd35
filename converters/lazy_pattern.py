"""Regular expressions that cost nothing until they are used.

``re.compile`` takes 0.1 to 0.5 ms, and a command imports more expressions than it ever
matches with. So an expression of a module is a ``LazyPattern``, which compiles it at its
first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, AnyStr, Generic


class LazyPattern(Generic[AnyStr]):
    """A regular expression, with methods of ``re.Pattern``; ``pattern`` is its text."""

    def __init__(self, pattern: AnyStr, flags: int = 0):
        self.pattern: AnyStr = pattern
        self.flags = flags

    @cached_property
    def _compiled(self) -> re.Pattern[AnyStr]:
        return re.compile(self.pattern, self.flags)

    def match(self, text: AnyStr) -> re.Match[AnyStr] | None:
        """The match at the beginning of a text."""
        return self._compiled.match(text)

    def fullmatch(self, text: AnyStr) -> re.Match[AnyStr] | None:
        """The match of a whole text."""
        return self._compiled.fullmatch(text)

    def search(self, text: AnyStr) -> re.Match[AnyStr] | None:
        """The first match in a text."""
        return self._compiled.search(text)

    def finditer(self, text: AnyStr) -> Iterator[re.Match[AnyStr]]:
        """The matches in a text that do not overlap, in order."""
        return self._compiled.finditer(text)

    def findall(self, text: AnyStr) -> list[Any]:
        """The matches in a text that do not overlap; their groups where there are any."""
        return self._compiled.findall(text)

    def split(self, text: AnyStr) -> list[AnyStr]:
        """The texts between the matches in a text; their groups, too."""
        return self._compiled.split(text)

    def sub(
        self, replacement: AnyStr | Callable[[re.Match[AnyStr]], AnyStr], text: AnyStr
    ) -> AnyStr:
        """The text with every match replaced."""
        return self._compiled.sub(replacement, text)
