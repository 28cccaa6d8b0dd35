"""A path that is a URL: it is joined, compared and shown as a path is,
and never opened as one.

    source_path("s3://bucket/run") / "latest"     UrlPath("s3://bucket/run/latest")

So whatever takes a ``Path`` and only works with names takes a URL, too. What a
filesystem would be asked (``stat``, ``open``, ``iterdir`` ...) is refused here: that
goes through ``stores``, which knows who keeps the file. Empty parts are dropped, as in
any path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PosixPath, PurePath
from typing import NoReturn
from urllib.parse import unquote

from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern

_LOCAL = LazyPattern(r"file://(?:localhost)?(/.*)", re.IGNORECASE | re.DOTALL)
_DRIVE = LazyPattern(r"/[A-Za-z]:/")  # file:///C:/run
_SCHEME = LazyPattern(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # of one letter it is a drive
_HUB = LazyPattern(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?")
_REPOSITORY = LazyPattern(  # after the address of the Hub, in a browser and in fsspec
    r"(?P<type>datasets|spaces)?(?(type)/)"
    r"(?P<name>[\w.-]+(?:/(?!(?:tree|blob|resolve|raw|commits?|discussions)\b)[\w.-]+)?)"
    r"(?:@(?P<at>[^/?#]+)|/(?P<view>tree|blob|resolve)/(?P<of>refs/\w+/[^/?#]+|[^/?#]+))?"
    r"(?:[/?#].*)?"
)
# what the Hub shows beside repositories
_PAGES = ("docs", "models", "datasets", "spaces", "blog", "papers", "learn", "collections", "api")
_DOWNLOADS = {  # by scheme, the command that copies what a URL names
    "s3": "aws s3 cp --recursive {url} DIR",
    "gs": "gcloud storage cp --recursive {url} DIR",
    "http": "curl -LO {url}",
    "https": "curl -LO {url}",
}
_OF_A_FILESYSTEM = (
    *("stat", "lstat", "exists", "is_dir", "is_file", "is_symlink", "is_mount", "samefile"),
    *("iterdir", "glob", "rglob", "walk", "open", "read_bytes", "read_text", "readlink"),
    *("write_bytes", "write_text", "touch", "mkdir", "rmdir", "unlink", "rename", "replace"),
    *("chmod", "symlink_to", "hardlink_to", "owner", "group", "expanduser", "copy", "move"),
)


class UrlPath(PosixPath):
    """The path of a file or folder in a store that is not the local filesystem."""

    def __str__(self) -> str:
        scheme, colon, location = super().__str__().partition(":/")
        return f"{scheme}://{location.lstrip('/')}" if colon else scheme

    @property
    def parent(self) -> UrlPath:
        """The folder around it; around a bucket there is none, so it is its own."""
        is_bucket = len(self.parts) == 2 and self.parts[0].endswith(":")
        return self if is_bucket else super().parent

    @property
    def parents(self) -> tuple[UrlPath, ...]:
        """The folders around it, the nearest first."""
        parent = self.parent
        return () if parent == self else (parent, *parent.parents)

    def absolute(self) -> UrlPath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> UrlPath:
        """Itself: a URL has no links to follow."""
        return self

    def is_absolute(self) -> bool:
        """Whether it begins with a scheme;
        what is left of one by ``relative_to`` does not."""
        return bool(scheme_of(self))

    def refuse(self, *_: object, **__: object) -> NoReturn:
        """``CheckpointError``: nothing of the filesystem lies under a URL."""
        raise CheckpointError(
            f"{self} is a URL, and this step works with local files only: {download(str(self))}",
            "unsupported",
        )


for _name in _OF_A_FILESYSTEM:
    setattr(UrlPath, _name, UrlPath.refuse)


def scheme_of(name: str | os.PathLike[str]) -> str:
    """The scheme of a URL, in lower case; "" for a path."""
    if isinstance(name, PurePath) and not isinstance(name, UrlPath):
        return ""
    match = _SCHEME.match(os.fspath(name))
    return match[1].lower() if match else ""


def canonical(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path that "file:///PATH" stands for,
    another URL with its scheme in lower case.

    ``CheckpointError`` for an empty text, which ``Path`` would take for the current
    folder: it comes of a variable that is not set.
    """
    if isinstance(name, str) and not name:
        raise CheckpointError(
            "the path is empty, perhaps of a variable that is not set; name a folder or a file (. "
            "is the current folder)",
            "refused",
        )

    if isinstance(name, bytes) or isinstance(os.fspath(name), bytes):
        return canonical(os.fsdecode(name))  # as os.fsencode and os.listdir(b".") give them

    scheme = scheme_of(name)
    if not scheme:
        return name
    text = os.fspath(name)
    match = _LOCAL.fullmatch(text)
    if match is None:
        return scheme + text[len(scheme) :]

    path = unquote(match[1])
    return path[1:] if os.name == "nt" and _DRIVE.match(path) else path


def download(name: str | os.PathLike[str]) -> str:
    """The advice for a URL that is not read here,
    with the command where one is known."""
    url = os.fspath(name)
    if (place := _place_on_hub(url)) is not None:
        return _download_from_hub(url, place)

    command = _DOWNLOADS.get(scheme_of(url))
    return "download it first" + (f": {command.format(url=url)}" if command else "")


def _place_on_hub(url: str) -> str | None:
    """What follows the address of the Hub, or of ``$HF_ENDPOINT``; ``None`` elsewhere."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if endpoint and url.startswith(f"{endpoint}/"):
        return url[len(endpoint) + 1 :]
    match = _HUB.match(url)
    return url[match.end() :] if match is not None else None


def _download_from_hub(url: str, place: str) -> str:
    """The advice for what lies on the Hub: a model, a data set, a file of one, or a page."""
    match = _REPOSITORY.fullmatch(place)
    if match is None or match["name"].split("/")[0] in _PAGES:
        return "it is no repository of the Hub; name one: ckpt pull ORG/NAME DIR"
    if match["type"] is not None and match["view"] == "resolve":
        return f"download it first: curl -LO {url}"
    if match["type"] is not None:
        kind = match["type"].removesuffix("s")
        return f"download it first: hf download {match['name']} --repo-type {kind} --local-dir DIR"

    revision = match["at"] or match["of"]
    at_revision = f"@{revision}" if revision not in (None, "main") else ""
    return f"download it first: ckpt pull {match['name']}{at_revision} DIR"


def absolute(path: Path) -> Path:
    """The path from the root on,
    without ``.`` and ``..``, links kept; a URL is one already."""
    return path if isinstance(path, UrlPath) else Path(os.path.abspath(path))
