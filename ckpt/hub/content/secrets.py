"""Looks for secrets in a text that is about to be published.
Never prints the secret."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from converters.lazy_pattern import LazyPattern

MAX_TEXT_BYTES = 8 << 20  # bytes; configurations, code and cards are far smaller
_SUFFIXES = (".json", ".jinja", ".md", ".py", ".txt")
_TABLES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
# Forms that the services give out themselves, with an end that no word of a text has by
# chance.
_KINDS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an AWS access key": rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "a GitHub token": rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,})",
    "an API key (sk-)": rb"(?<![A-Za-z0-9])sk-(?=[\w-]*\d)[A-Za-z0-9_-]{20,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY",
    "a Weights & Biases key": (
        rb"(?i)(?:wandb|w&b)[\w .-]{0,20}?(?:key|token)\W{1,6}(?:local-)?[0-9a-f]{40}(?![0-9a-f])"
        rb"|(?<![A-Za-z0-9])wandb_v1_[A-Za-z0-9_]{40,}"
    ),
    "a password in an address": (
        rb"[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/:@\"'<>{}$]{1,80}:[^\s/@\"'<>{}$]{3,200}@[A-Za-z0-9]"
    ),
}
_FORMS = tuple((kind, LazyPattern(form)) for kind, form in _KINDS.items())


@dataclass(frozen=True, slots=True)
class Secret:
    """Something like a secret: its kind, and its line, counted from 1."""

    kind: str
    line: int


def is_readable_text(path_in_repo: str) -> bool:
    """Whether a file is text that somebody wrote or a program configured:
    no table of words."""
    name = path_in_repo.rpartition("/")[2]
    return name not in _TABLES and (name.endswith(_SUFFIXES) or name == "LICENSE")


def secrets(text: bytes) -> Iterator[Secret]:
    """The places that look like one, in the order of the kinds; one a line and kind."""
    for kind, pattern in _FORMS:
        last_line = 0
        for match in pattern.finditer(text):
            line_number = text.count(b"\n", 0, match.start()) + 1
            if line_number != last_line:
                last_line = line_number
                yield Secret(kind, line_number)
