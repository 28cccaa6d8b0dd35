"""The files that make weights a model folder, as ``from_pretrained`` wants them.

They are taken by an allow list: what save_pretrained of models, tokenizers and
processors writes (transformers 4 and 5), the vocabulary files that any tokenizer names,
the folders of sentence-transformers, and of the Python files only those that an
``auto_map`` needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ckpt.weights.companions import json_files, model_code, module_folders
from ckpt.weights.companions.model_code import is_file
from ckpt.weights.companions.reader_files import VOCABULARY_FILES
from converters.errors import CheckpointError
from converters.storage import misplaced_files, stores
from converters.tensors import DType

_MODEL = ("generation_config.json",)
# Files of tokenizers and processors.
_READERS = (
    *VOCABULARY_FILES,
    *("tokenizer*.json", "tokenizer*.model", "tokenizer.model.v*", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "*.tiktoken", "tiktoken.model", "*.spm", "sentencepiece*.model"),
    *("*preprocessor_config.json", "processor_config.json"),
    *("image_processor*.json", "video_processor*.json", "feature_extractor*.json"),
    *("audio_tokenizer_config.json", "alphabet.json", "speaker_embeddings*.json"),
)
# Folders of processors, with the files in them that are taken: chat templates;
# InstructBLIP's qformer_tokenizer and RAG's question_encoder_tokenizer; Bark's voices;
# Wav2Vec2's decoder.
_READER_FOLDERS = {
    "additional_chat_templates": ("*.jinja",),
    "*_tokenizer": _READERS,
    "speaker_embeddings": ("*.npy",),
    "language_model": ("attrs.json", "unigrams.txt", "*.arpa", "*.binary"),
}
# Files of sentence-transformers: of the model, and of a module in its own folder.
_MODULAR = (
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *(module_folders.ROUTER, "model_card_data.json"),
)
_MODULE = (*_READERS, *_MODEL, "config.json", "*_config.json")
# Files that are never taken, whatever other pattern they fit: state of the training,
# pickles of its arguments, and what may be secret.
_STATE = (
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*"),
    *("trainer_state*", "training_args*", "*_states.pt"),
    *("zero_to_fp32.py", "zero_to_torch.py"),
)
_SECRET = (
    *(".*", "*secret*", "*credential*", "*password*", "*private*"),
    *("*_key.*", "*_keys.*", "*api_key*", "*apikey*", "*access_token*", "*auth_token*"),
)
_NEVER = (*_STATE, *_SECRET)
DTYPE_NAMES = {
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F64: "float64",
}


@dataclass(frozen=True, slots=True)
class Companions:
    """Files to copy beside weights, by their names in the model folder.

    A name has a slash where the file lies in a folder inside.

    ``model`` belongs to the model, ``readers`` to its tokenizer and processor.
    ``notes`` are lines on what may be amiss. config.json is not among them.
    """

    model: Mapping[str, Path] = field(default_factory=dict)
    readers: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, Path]:
        """All of them."""
        return {**self.model, **self.readers}


def companion_files(root: Path, is_readable: Callable[[Path], bool] = is_file) -> Companions:
    """The files of ``root`` to copy beside the weights, by an allow list.

    Optimizer, scheduler, RNG and trainer state and ``training_args.bin`` are never
    among them. ``is_readable`` says which Python files, and which files that name them,
    may be taken. ``OSError`` for one that cannot be read.
    """
    code = model_code.code(root, is_readable)
    present = stores.names(root)
    names = [name for name in present if stores.is_file(root / name)]
    readers = [name for name in names if _fits(name, (*_READERS, *sorted(code.vocabulary)))]
    readers += list(_in_folders(root))

    patterns = (*_READERS, *_MODEL, *_MODULAR)
    dead_links = [name for name in present if stores.is_dead_link(root / name)]
    broken = {name: "is a link that leads nowhere" for name in dead_links if _fits(name, patterns)}
    broken |= {
        name: problem
        for name in readers
        if (problem := misplaced_files.readable_file(root / name)) is not None
    }
    readers = [name for name in readers if name not in broken]

    model = [name for name in names if name not in readers and _fits(name, (*_MODEL, *_MODULAR))]
    model += [name for name in names if name in code.files]
    inner, notes = _of_modules(root)

    return Companions(
        {name: root / name for name in dict.fromkeys((*model, *inner))},
        {name: root / name for name in readers},
        (
            *code.notes,
            *notes,
            *(f"{n} {problem}; it is left out" for n, problem in broken.items()),
        ),
    )


def companions(root: Path) -> list[Path]:
    """The files of ``companion_files``, config.json not among them."""
    return list(companion_files(root).files.values())


def is_reader(name: str) -> bool:
    """Whether a file in a model folder is one of a tokenizer or processor, by its name."""
    folder, _, file = name.rpartition("/")
    patterns = next(
        (inner for outer, inner in _READER_FOLDERS.items() if fnmatchcase(folder, outer)), _READERS
    )
    return _fits(file, patterns)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return not _fits_any(name.lower(), _NEVER) and _fits_any(name, patterns)


def _fits_any(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name is one of the patterns, most of which are names, or fits one."""
    if name in patterns:
        return True
    return any(fnmatchcase(name, pattern) for pattern in patterns if "*" in pattern)


def _in_folders(root: Path) -> Iterator[str]:
    """The files of a processor that lie in folders of their own."""
    for folder in stores.folders(root):
        for pattern, inner in _READER_FOLDERS.items():
            if not fnmatchcase(folder, pattern):
                continue
            for path in sorted(_two_levels(root / folder)):
                if stores.is_file(path) and _fits(path.name, inner):
                    yield path.relative_to(root).as_posix()


def _two_levels(folder: Path) -> Iterator[Path]:
    """What lies in a folder and in the folders in it."""
    for entry in stores.entries(folder):
        yield folder / entry.name
        if entry.is_folder:
            yield from (folder / entry.name / name for name in stores.names(folder / entry.name))


def _of_modules(root: Path) -> tuple[list[str], tuple[str, ...]]:
    """The files in the folders of a sentence-transformers model, without weights."""
    try:
        modules = module_folders.modules(root)
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{root}/")
        return [], (f"{problem}; the folders of the modules are left out",)

    names = []
    for folder in dict.fromkeys(module.folder for module in modules if module.folder):
        place = root / folder
        for name in stores.names(place) if stores.is_folder(place) else ():
            if stores.is_file(place / name) and _fits(name, _MODULE):
                names.append(f"{folder}/{name}")

    return names, ()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may have NaN and Infinity in it.

    ``CheckpointError`` if the file has none.
    """
    content = json_files.read(path, "a configuration", infinite=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")

    return content


def set_dtype(content: dict[str, Any], name: str) -> None:
    """Sets every type of weights that a configuration states, those of its parts too."""
    for key, value in content.items():
        if key in ("dtype", "torch_dtype"):
            content[key] = name
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            set_dtype(value, name)


def with_own_class(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the model's class, where FSDP2's stands in its place.

    ``fully_shard`` makes a class ``FSDPX`` of a module's class ``X`` (torch 2.13
    ``distributed/fsdp/_fully_shard``), whose name some tools save.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not any(str(name).startswith("FSDP") for name in names):
        return config
    own_names = [name.removeprefix("FSDP") if isinstance(name, str) else name for name in names]
    return config | {"architectures": own_names}


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that config.json names.

    Of some models with a vision part transformers 4.57 writes it into ``text_config``
    alone (configuration_qwen2_vl.py: Qwen2VLConfig.__setattr__).
    """
    names = config.get("architectures")
    text = config.get("text_config")
    if names is None and isinstance(text, dict):
        names = text.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None


def ties(config: Mapping[str, Any], default: bool = True) -> bool:
    """Whether a configuration ties the embeddings; ``default`` if it does not say."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", default) if isinstance(text, dict) else default
    return config.get("tie_word_embeddings", inner) is not False
