"""Files that lie where a checkpoint should: a Git LFS pointer, a web page, a download
that did not end.

Told from the first bytes of a file and the names in a folder; nothing is opened that is
not small. Sources: the Git LFS specification (docs/spec.md), huggingface_hub 1.x
(``file_download.py``: names of unfinished downloads, the layout of the cache), torch
2.13 (``distributed/checkpoint``).
"""

from __future__ import annotations

import os
from pathlib import Path

from converters.storage import stores
from converters.storage.url_path import UrlPath

_HEAD_BYTES = 128  # as far as any of these signs reaches
LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype html", b"<html", b"<head")
# What the Hub and object stores answer in place of a file, as text or as JSON.
_ANSWERS = (
    *(b"entry not found", b"repository not found", b"access denied", b"invalid username or pass"),
    *(b'{"error":"', b'{"error": "', b'{"error":{', b'{"error": {'),
)
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")


def content(head: bytes) -> str | None:
    """A description of a file by its first bytes, and the advice; ``None`` if it is
    nothing known here."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(LFS):
        return "is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
    if text.startswith(_PAGES):
        return (
            "is a web page (HTML), not the file itself: download the file's own "
            "address (on the Hub: .../resolve/main/..., or hf download), logged in "
            "where that is needed"
        )
    if text.startswith(b"<?xml"):
        return "is an XML text, such as a storage service answers with an error; download it again"
    if text.startswith(_ANSWERS):
        answer = head[:40].decode("ascii", "replace").strip()
        return f"is an answer of a server ({answer!r}), not the file itself: download it again"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"7z\xbc\xaf")):
        return "is a compressed archive: unpack it first"

    return None


def readable_file(path: Path) -> str | None:
    """The reason why a file is not what its name says; ``OSError`` if it cannot be read."""
    return content(stores.head(path, _HEAD_BYTES))


def file(path: Path) -> str | None:
    """The same, for whoever explains an error: ``None`` also if it cannot be read."""
    try:
        return readable_file(path)
    except OSError:
        return None


def missing(folder: Path) -> str:
    """The reason in a folder why files are missing from it,
    as the end of a sentence, or nothing."""
    try:
        names = stores.names(folder)
    except OSError:
        return ""

    if unfinished := [name for name in names if name.lower().endswith(UNFINISHED)]:
        return f"; {unfinished[0]} is a download that did not end: download it again"
    return "" if isinstance(folder, UrlPath) else _missing_of_local(folder, names)


def _missing_of_local(folder: Path, names: list[str]) -> str:
    """The same for what only a local folder has: a cache of downloads, links."""
    for parent in (folder, *folder.absolute().parents[:3]):
        download_cache = parent / ".cache" / "huggingface" / "download"
        if (
            download_cache.is_dir()
            and (unfinished_download := next(download_cache.rglob("*.incomplete"), None))
            is not None
        ):
            return f"; {unfinished_download} is a download that did not end: run hf download again"

    blobs = folder.absolute().parent.parent / "blobs"
    if folder.absolute().parent.name == "snapshots" and any(blobs.glob("*.incomplete")):
        return f"; {blobs} has a download that did not end: run hf download again"

    if dangling := [name for name in names if stores.is_dead_link(folder / name)]:
        return _broken_link(folder / dangling[0], dangling[0])

    return ""


def download_to(path: Path) -> str:
    """The end of a sentence for a file whose download has not come
    to its end, or nothing."""
    for suffix in UNFINISHED:
        download = path.with_name(path.name + suffix) if path.name else path
        if stores.is_file(download):
            return f"; {download.name} is a download that did not end: download it again"
    return ""


def link(path: Path) -> str:
    """The end of a sentence for a link that leads nowhere, or a path below one;
    nothing for anything else."""
    for place in (path, *path.parents):
        try:
            is_dead = stores.is_dead_link(place)
        except OSError:  # where nobody may look
            continue
        if is_dead:
            return _broken_link(place, place.name if place == path else str(place))
    return ""


def _broken_link(path: Path, name: str) -> str:
    target = os.readlink(path)
    remedy = "; download it again with hf download" if "blobs" in Path(target).parts else ""
    return f"; {name} is a link to {target}, which is not there{remedy}"
