"""Single files of other kinds: pointers, pages, archives."""

from __future__ import annotations

from converters.detect import filenames, foreign
from converters.detect.kind import Kind
from converters.detect.look import Look
from converters.storage import misplaced_files


def pointer(look: Look) -> str | None:
    """A Git LFS pointer."""
    return _content(look, "Git LFS")


def web_page(look: Look) -> str | None:
    """An answer of a server in the place of the file: a page, an error."""
    return _content(look, "web page", "XML", "answer of a server")


def compressed(look: Look) -> str | None:
    """An archive or a compressed file, by its first bytes or its name."""
    if look.is_unfinished:
        return None
    is_tar = look.head[257:262] == b"ustar"
    is_rar = look.head.startswith(b"Rar!")
    if foreign.is_named_as_foreign(look.path.name):
        return None
    # a file that is named as weights are is left to their reader
    is_named_weights = look.path.suffix in filenames.ZIP_SUFFIXES
    is_zip = look.head.startswith(b"PK") and not (look.begins_as_torch_save or is_named_weights)
    is_named = look.is_file and filenames.ARCHIVE.fullmatch(look.path.name)
    is_compressed = _content(look, "compressed") is not None
    if not (is_compressed or is_tar or is_rar or is_zip or is_named):
        return None
    if is_named or not (is_tar or is_zip):
        return f"is an archive: {filenames.unpacking(look.path)}"
    command = "tar xf" if is_tar else "unzip"
    return f"is an archive: unpack it first ({filenames.unpacked_by(command, look.path)})"


def pointer_file(look: Look) -> str | None:
    """A file that names the newest tag or checkpoint of its folder."""
    return str(look.path.parent) if look.is_file and look.path.name in filenames.POINTERS else None


def model_file(look: Look) -> str | None:
    """A file that lies beside weights: the config,
    the tokenizer, an index, a record of ckpt."""
    is_one = look.is_file and filenames.OF_MODEL.fullmatch(look.path.name)
    return str(look.path.parent) if is_one else None


def _content(look: Look, *words: str) -> str | None:
    why = misplaced_files.content(look.head)
    return why if why and any(word in why for word in words) else None


KINDS = (
    Kind(
        name="git-lfs-pointer",
        title="Git LFS pointer",
        recognized_by="the first line, `version https://git-lfs...`",
        sign=pointer,
        statement="{evidence}",
        refusal="{statement}",
    ),
    Kind(
        name="web-page",
        title="answer of a server",
        recognized_by="HTML, XML or a server's words in the place of the file",
        sign=web_page,
        statement="{evidence}",
        refusal="{statement}",
    ),
    Kind(
        name="archive",
        title="archive",
        recognized_by="the first bytes or the suffix: tar, zip, 7z, rar, gz, bz2, xz, zst",
        sign=compressed,
        statement="{evidence}",
        refusal="{statement}",
    ),
    Kind(
        name="pointer-file",
        title="file that names the newest checkpoint",
        recognized_by="the name: `latest`, `latest_universal` or `best`",
        sign=pointer_file,
        statement="is a text file that names the newest or the best checkpoint in its folder",
        remedy="name the folder: {evidence}",
        refusal="{statement}; {remedy}",
    ),
    Kind(
        name="model-file",
        title="single file of a model without weights",
        recognized_by="the name: `config.json`, `tokenizer.json`, `*.index.json`, "
        "`zero_to_fp32.py` and so on",
        sign=model_file,
        statement="is one file of a model or a checkpoint, without weights",
        remedy="name its folder: {evidence}",
        refusal="{statement}; {remedy}",
    ),
)
