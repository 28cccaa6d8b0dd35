"""Weights that other libraries wrote,
which nothing here reads: each is called by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from converters.detect import filenames
from converters.detect.kind import Kind
from converters.detect.look import Look
from converters.lazy_pattern import LazyPattern
from converters.words import some

_FROM_OTHERS = "from_pretrained(..., {flag}=True) of transformers 4 loads it, and save_pretrained "
_FROM_OTHERS += "writes it again"
_SHARD = LazyPattern(r"(.+)-\d{5}-of-\d{5}\.(safetensors|bin)")
_LOOSE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class _Format(NamedTuple):
    """A format of weights: its names of files, its first bytes, and what handles it."""

    name: str
    title: str
    recognized_by: str
    statement: str
    remedy: str
    suffixes: tuple[str, ...]
    heads: tuple[bytes, ...] = ()
    is_known_by_head: bool = False  # whatever a file is named

    def has_name(self, file_name: str) -> bool:
        """Whether a file is named so."""
        return file_name.lower().endswith(self.suffixes)

    def sign(self, look: Look) -> str | None:
        """A file of the format, by its first bytes or its name."""
        if not look.is_file or look.is_unfinished:
            return None
        is_one = self.has_name(look.path.name) or look.head.startswith(self.heads or (b"\0\0",))
        return look.path.name if is_one and look.head.strip(b"\0") else None

    def kind(self) -> Kind:
        """The row for a file of it."""
        return Kind(
            name=self.name,
            title=self.title,
            recognized_by=self.recognized_by,
            sign=self.sign,
            statement=self.statement,
            remedy=self.remedy,
            refusal="{statement}, which ckpt does not read: {remedy}",
            trouble="unsupported",
        )


FORMATS = (
    _Format(
        name="gguf",
        title="model of llama.cpp",
        recognized_by="the first four bytes, `GGUF`, or the suffix `.gguf`",
        statement="is a file of llama.cpp (GGUF)",
        remedy="llama.cpp runs it, and transformers loads it with from_pretrained(..., "
        "gguf_file=...)",
        suffixes=(".gguf",),
        heads=(b"GGUF",),
        is_known_by_head=True,
    ),
    _Format(
        name="hdf5",
        title="weights of TensorFlow or Keras",
        recognized_by="the first bytes of HDF5, or the suffix `.h5`, `.hdf5` or `.keras`",
        statement="is a file of TensorFlow or Keras (HDF5)",
        remedy=_FROM_OTHERS.format(flag="from_tf"),
        suffixes=(".h5", ".hdf5", ".keras"),
        heads=(b"\x89HDF\r\n\x1a\n",),
    ),
    _Format(
        name="flax",
        title="weights of Flax",
        recognized_by="the suffix `.msgpack`",
        statement="is a file of Flax (msgpack)",
        remedy=_FROM_OTHERS.format(flag="from_flax"),
        suffixes=(".msgpack",),
    ),
    _Format(
        name="onnx",
        title="model in ONNX",
        recognized_by="the suffix `.onnx`",
        statement="is a model in ONNX",
        remedy="onnx.load reads it; take the model that it was exported from",
        suffixes=(".onnx",),
    ),
    _Format(
        name="numpy",
        title="arrays of numpy",
        recognized_by="the suffix `.npy` or `.npz`",
        statement="is a file of numpy",
        remedy="numpy.load reads it",
        suffixes=(".npy", ".npz"),
        heads=(b"\x93NUMPY",),
    ),
    _Format(
        name="torch-program",
        title="exported program of torch",
        recognized_by="the suffix `.pt2`",
        statement="is a program that torch.export saved",
        remedy="torch.export.load reads it",
        suffixes=(".pt2",),
    ),
    _Format(
        name="tensorflow",
        title="checkpoint of TensorFlow",
        recognized_by="the suffix `.ckpt.index`, `.ckpt.meta` or `.pb`",
        statement="is a file of TensorFlow",
        remedy="TensorFlow reads it; save the model with save_pretrained of transformers",
        suffixes=(".ckpt.index", ".ckpt.meta", ".pb"),
    ),
    _Format(
        name="pickle",
        title="pickle of Python",
        recognized_by="the suffix `.pkl`, `.pickle` or `.joblib`",
        statement="is a pickle, and not one of torch.save",
        remedy="pickle.load runs what it says, so load it only if you trust it, and save the "
        "tensors with safetensors",
        suffixes=(".pkl", ".pickle", ".joblib"),
    ),
)


def is_named_as_foreign(file_name: str) -> bool:
    """Whether a file is named as one of a format that its name alone tells, such as
    ``.npz``, which is a zip file and no archive."""
    return any(
        file_format.has_name(file_name)
        for file_format in FORMATS
        if not file_format.is_known_by_head
    )


def folder_of_another(look: Look) -> str | None:
    """A folder with a file of such a format: its name, and what it is."""
    for file_name in look.names:
        for file_format in FORMATS:
            if file_format.has_name(file_name):
                return f"{file_name}, which {file_format.statement}: {file_format.remedy}"

    return None


def shards_alone(look: Look) -> str | None:
    """A folder with shards of a model, and without the index that says what is in them."""
    match = next(filter(None, map(_SHARD.fullmatch, look.names)), None)
    return None if match is None else f"{match[1]}.{match[2]}.index.json"


def other_names(look: Look) -> str | None:
    """A folder with weights under names that nobody looks for: the first of them."""
    return some(_loose(look)) or None


def _loose(look: Look) -> list[str]:
    """The names of files that may be weights."""
    names = [name for name in look.names if name.endswith(_LOOSE)]
    return [name for name in names if not filenames.OF_TRAINER.fullmatch(name)]


def trainer_files(look: Look) -> str | None:
    """A folder with files of a trainer's states, and none that may be weights."""
    names = [name for name in look.names if filenames.OF_TRAINER.fullmatch(name)]
    return None if _loose(look) else some(names) or None


def _folder(name: str, title: str, by: str, sign: Callable[[Look], str | None], words: str) -> Kind:
    return Kind(
        name=name, title=title, recognized_by=by, sign=sign, statement=words, refusal="{statement}"
    )


FIRST = tuple(file_format.kind() for file_format in FORMATS if file_format.is_known_by_head)
FILES = tuple(file_format.kind() for file_format in FORMATS if not file_format.is_known_by_head)
FOLDERS = (
    _folder(
        "shards-alone",
        "shards of a model without their index",
        "`*-00001-of-00003.safetensors` (or `.bin`) and no index",
        shards_alone,
        "holds shards of a model without their index, {evidence}: copy or download it to there",
    ),
    _folder(
        "trainer-states",
        "states of a trainer without the weights",
        "`optimizer.pt`, `rng_state_R.pth` and so on, and no file that may be weights",
        trainer_files,
        "holds files of a checkpoint of the Trainer or Accelerate without its weights, {evidence}; "
        "copy these to there (ckpt show FILE says what one of the files holds)",
    ),
    _folder(
        "other-names",
        "weights under other names",
        "files in `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` under other names",
        other_names,
        "holds no checkpoint, but files that may be weights, {evidence}: name the file, and "
        "ckpt show and ckpt.open read it",
    ),
    _folder(
        "foreign-folder",
        "folder of another library",
        "a file of one of the formats above that ckpt does not read",
        folder_of_another,
        "holds no weights that ckpt reads, but {evidence}",
    ),
)
