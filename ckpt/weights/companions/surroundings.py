"""The files beside the weights: config.json, tokenizer, processor, code.

They are looked for beside the state files, in the checkpoint and one folder up, in this
order; what the user names comes first (``--config``, ``--tokenizer``; ``--base`` where
there is nothing else).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt.runs import engines
from ckpt.weights.companions import model_code, model_folder, module_folders
from ckpt.weights.companions.model_folder import Companions
from ckpt.weights.request import Request
from converters import options
from converters.errors import CheckpointError, unreadable
from converters.lazy_pattern import LazyPattern
from converters.options import TOKENIZER
from converters.source import Place
from converters.storage import bounded_json, misplaced_files, stores
from converters.tensors import Weights

CONFIG = "config.json"
_SEVERAL = LazyPattern(r"pytorch_model(_\d+)?")  # Accelerate's tags of several models in one folder


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The files that a model folder needs beside its weights.

    ``config`` is the content of config.json, or ``None``; ``config_path`` is its place.
    ``companions`` are files to copy, by their names in the output (with a slash in a
    folder).
    """

    config: Mapping[str, Any] | None = None
    config_path: Path | None = None
    companions: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Config:
    """A config.json, or why there is none."""

    content: Mapping[str, Any] | None = None
    path: Path | None = None
    notes: tuple[str, ...] = ()


def no_config() -> str:
    """The note where no model is described."""
    return (
        "no config.json in the checkpoint: the output is weights only; "
        f"{options.CONFIG('DIR')} takes config.json and the other files of a model from a "
        f"folder, {TOKENIZER('DIR')} a tokenizer"
    )


def of(place: Place, request: Request, weights: Weights | None = None) -> Surroundings:
    """The files beside the checkpoint, or where the user says.

    ``weights`` decide which of several models in one folder a config.json is of.
    ``CheckpointError`` if a file that the user names is missing or broken; broken files
    of the checkpoint are only noted.
    """
    config = _own_config(place, weights)
    homes = _homes(place)
    if config.path is not None and config.path.parent not in (place.folder, place.root):
        homes.append(config.path.parent)
    companions = _merge(_companions_of(home) for home in homes)

    if request.config is not None:
        config, companions = _config_of_user(request.config, config, companions)
    elif request.base is not None and stores.is_folder(request.base):
        config, companions = _config_of_base(request.base, config, companions)

    if request.tokenizer is not None:
        companions = _replace_tokenizer(request.tokenizer, companions)
    elif not companions.readers:
        companions = _with_tokenizer_of_run(place.root, companions)

    notes = (*config.notes, *companions.notes)
    if config.content is None and not config.notes and not _needs_none(companions):
        notes = (*notes, no_config())
    return Surroundings(config.content, config.path, companions.files, notes)


def _with_tokenizer_of_run(root: Path, companions: Companions) -> Companions:
    """The same with the tokenizer of the run, where the checkpoint has none."""
    from ckpt.weights.companions import run_folder

    readers = run_folder.readers(root)
    if not readers:
        return companions
    note = f"{run_folder.note(readers)}; {TOKENIZER('DIR')} takes another"
    return replace(companions, readers=readers, notes=(*companions.notes, note))


def _needs_none(companions: Companions) -> bool:
    """Whether this is a sentence-transformers model without a root transformer."""
    path = companions.model.get(model_code.MODULES)
    try:
        modules = module_folders.modules(path.parent) if path else ()
    except CheckpointError:
        return False

    root_modules = [module for module in modules if not module.folder]

    return bool(modules) and not any("Transformer" in module.kind for module in root_modules)


def _homes(place: Place) -> list[Path]:
    """The folders with the files beside the weights, the nearest to the states first."""
    config_path = place.folder / CONFIG
    if stores.exists(config_path) or stores.is_dead_link(config_path):
        return [place.folder]
    from ckpt.weights.companions import run_folder

    if any(stores.is_file(place.folder / name) for name in run_folder.SIGNS):
        return [place.folder, place.root]
    return [place.root]


def config_of(place: Place) -> Mapping[str, Any] | None:
    """The checkpoint's own config.json; ``None`` if it has none that can be read."""
    return _own_config(place, None).content


def config_text(config: Mapping[str, Any], dtype: str) -> bytes:
    """config.json with the type of the weights set to ``dtype``, such as ``float32``."""
    content = json.loads(json.dumps(config))
    model_folder.set_dtype(content, dtype)
    if not {"dtype", "torch_dtype"} & content.keys():
        content["dtype"] = dtype
    return bounded_json.dumps(content, sort_keys=True)


def _own_config(place: Place, weights: Weights | None) -> _Config:
    """The checkpoint's own: beside its state files, in its folder, or one folder up."""
    for path in dict.fromkeys((place.folder / CONFIG, place.root / CONFIG)):
        config = _read(path)
        if config.content is None and not config.notes:
            continue
        if config.content is not None and path.parent == place.root and weights is not None:
            config = _of_this_model(config, place, weights)
        return config

    above = place.root.resolve().parent / CONFIG
    config = _Config() if engines.others(place.root) else _read(above)
    if config.content is not None and {"model_type", "architectures"} & config.content.keys():
        note = f"config.json is that of the folder above the checkpoint{_elsewhere()}"
        return replace(config, notes=(note,))

    return _Config()


def _read(path: Path) -> _Config:
    """The config.json at ``path``. A broken one is a note, as the weights are whole."""
    if stores.is_file(path):
        try:
            return _Config(model_folder.with_own_class(model_folder.read_object(path)), path)
        except CheckpointError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, PermissionError):
                raise  # the disk fails, the file may be right
            problem = _why_broken(path, error)
    elif stores.is_dead_link(path):
        problem = "is a link that leads nowhere"
    elif stores.exists(path):
        problem = "is not a file"
    else:
        return _Config()

    return _Config(
        notes=(f"config.json of the checkpoint {problem}; none is written{_elsewhere()}",)
    )


def _why_broken(path: Path, error: CheckpointError) -> str:
    if (problem := misplaced_files.file(path)) is not None:
        return problem
    if not stores.status(path).size:
        return "is empty"
    return str(error).removeprefix(f"{path} ")


def _of_this_model(config: _Config, place: Place, weights: Weights) -> _Config:
    """The config.json of a folder with several models, if it is of the converted one."""
    several = [name for name in stores.folders(place.root) if _SEVERAL.fullmatch(name)]
    if place.tag not in several or len(several) < 2:
        return config

    assert config.content is not None
    situation = f"the folder holds the models {', '.join(several)} and one config.json"
    sizes = _sizes(config.content)
    if sizes is None:
        note = f"{situation}, taken for {place.tag}: compare them{_elsewhere()}"
        return replace(config, notes=(note,))

    sizes_text = f"vocab_size {sizes[0]}, hidden_size {sizes[1]}"
    if not any(ref.shape == sizes for ref in weights.tensors.values()):
        note = (
            f"{situation}, which is of another model than {place.tag} ({sizes_text}: no "
            f"tensor has this shape), so no config.json is written; {options.CONFIG('DIR')} takes "
            "the right one"
        )
        return _Config(notes=(note,))

    note = f"{situation}, taken for {place.tag} because its sizes fit ({sizes_text}){_elsewhere()}"

    return replace(config, notes=(note,))


def _sizes(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the embeddings that a configuration states."""
    text = config.get("text_config")
    for content in (config, text if isinstance(text, dict) else {}):
        rows, columns = content.get("vocab_size"), content.get("hidden_size")
        if isinstance(rows, int) and isinstance(columns, int):
            return rows, columns

    return None


def _companions_of(home: Path) -> Companions:
    try:
        return model_folder.companion_files(home)
    except OSError as error:
        raise unreadable(error, home) from error


def _merge(parts: Iterable[Companions]) -> Companions:
    """The files of several folders, the first with a tokenizer giving all of it."""
    total = Companions()
    for part in parts:
        total = Companions(
            {**part.model, **total.model},
            total.readers or part.readers,
            (*total.notes, *part.notes),
        )

    return total


def _config_of_user(
    path: Path, own_config: _Config, companions: Companions
) -> tuple[_Config, Companions]:
    """The configuration that ``--config`` names, and the other files of its folder."""
    if not stores.exists(path):
        raise CheckpointError(
            f"{options.CONFIG(path)} does not exist; name a config.json or a model's folder",
            "incomplete",
        )

    in_folder = stores.is_folder(path)
    file = path / CONFIG if in_folder else path
    if in_folder and not stores.is_file(file) and stores.is_file(path / "modules.json"):
        config = own_config  # sentence-transformers without a transformer in the folder itself
    elif not stores.is_file(file):
        raise CheckpointError(f"{options.CONFIG(path)} holds no config.json", "incomplete")
    else:
        config = _require(file)
        if own_config.path is not None and own_config.path.resolve() != file.resolve():
            note = f"config.json is the one that {options.CONFIG} names, not the checkpoint's own"
            config = replace(config, notes=(note,))

    if in_folder:
        donor = _companions_of(path)
        model, notes = {**companions.model, **donor.model}, donor.notes
        readers = companions.readers or donor.readers
    else:  # nothing but the code that this file names
        code = model_code.code(file.parent, configs=(file.name,))
        model = {**companions.model, **{name: file.parent / name for name in code.files}}
        readers, notes = companions.readers, code.notes

    notes = (*_without_missing_code(companions.notes, model), *notes)

    return config, Companions(model, readers, notes)


def _require(file: Path) -> _Config:
    """A config.json that the user names; ``CheckpointError`` if it is broken."""
    try:
        return _Config(model_folder.read_object(file), file)
    except CheckpointError as error:
        raise CheckpointError(f"{file} {_why_broken(file, error)}") from error


def _without_missing_code(notes: tuple[str, ...], model: Mapping[str, Path]) -> tuple[str, ...]:
    """The notes but for those on missing code that another folder has given."""
    modules = [name.removesuffix(".py") for name in model]
    return tuple(
        note
        for note in notes
        if not any(model_code.is_on_missing(note, module) for module in modules)
    )


def _config_of_base(
    path: Path, own_config: _Config, companions: Companions
) -> tuple[_Config, Companions]:
    """The base model's configuration and tokenizer, where the checkpoint has none."""
    config = own_config
    if own_config.content is None and stores.is_file(path / CONFIG):
        config = _require(path / CONFIG)
    donor = _companions_of(path)
    model = {**donor.model, **companions.model} if config is not own_config else companions.model
    return config, Companions(model, companions.readers or donor.readers, companions.notes)


def _replace_tokenizer(path: Path, companions: Companions) -> Companions:
    """The same with the tokenizer and the processor of another folder."""
    if not stores.is_folder(path):
        what = "is a file; name its folder" if stores.exists(path) else "does not exist"
        raise CheckpointError(f"{TOKENIZER(path)} {what}", "incomplete")

    donor = _companions_of(path)
    if not donor.readers:
        raise CheckpointError(
            f"{TOKENIZER(path)} holds no files of a tokenizer or processor",
            "incomplete",
        )

    code = model_code.code(path, configs=model_code.AUTO_MAPS[1:])
    notes = (*companions.notes, *code.notes)
    if companions.readers:
        notes = (
            *notes,
            f"the tokenizer is the one that {TOKENIZER} names, not the checkpoint's own",
        )

    model = {**{name: path / name for name in code.files}, **companions.model}

    return Companions(model, donor.readers, notes)


def _elsewhere() -> str:
    """The end of a note on a config.json that may not be the right one."""
    return f"; {options.CONFIG('DIR')} takes another"
