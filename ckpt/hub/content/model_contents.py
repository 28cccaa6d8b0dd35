"""The contents that a push sends of a checkpoint's model: converted while it is sent,
or stored as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt.hub.content import model_facts as known
from ckpt.hub.content.allow_list import (
    CARD,
    Allowed,
    allowed,
    of_conversion,
    of_stored,
)
from ckpt.hub.content.items import Contents, Item
from ckpt.hub.content.publishable import (
    dominant_type,
    has_safetensors,
    is_adapter_folder,
    listed_item,
    module_weights_names,
    require_config,
    require_loadable,
    require_no_pickle,
    require_openable,
    weights_names,
)
from ckpt.runs import engines
from ckpt.runs.run import RunCheckpoint
from ckpt.weights import absences, quantized_facts
from ckpt.weights.companions import model_folder
from ckpt.weights.conversion import convert
from ckpt.weights.conversion.task import Conversion
from ckpt.weights.reader import untying
from ckpt.weights.request import DTYPES, Request
from converters import quantized
from converters.detect import detect, sharded
from converters.detect.deepspeed import UNIVERSAL
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.options import DTYPE
from converters.storage import bounded_json
from converters.tensors import DType, TensorRef, Weights
from converters.words import shell_word
from converters.zero.files import discovery
from converters.zero.universal import reader as universal

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def of_model(
    checkpoint: RunCheckpoint, dtype: str | None, max_shard_size: int, request: Request | None
) -> tuple[Contents, Path]:
    """The files that ``from_pretrained`` wants,
    and the folder that its configuration is in."""
    if _holds_weights_alone(checkpoint):
        if has_safetensors(checkpoint.folder):
            return _stored(checkpoint, dtype, request), checkpoint.folder
        return _of_pickles(checkpoint, dtype, max_shard_size, request), checkpoint.folder

    tag = _tag_of_one_engine(checkpoint)
    model_root = _root_of(checkpoint.folder, tag)
    has_adapter = (model_root / ADAPTER[0]).is_file()
    is_config_named = request is not None and request.config is not None
    is_config_sent = not has_adapter and not is_config_named
    if is_config_sent and os.path.lexists(model_root / "config.json"):
        listed_item(
            replace(checkpoint, folder=model_root), "config.json", must_be_listed=False
        ).require_whole()

    conversion = convert.plan(
        checkpoint.folder,
        tag=tag,
        dtype=dtype or "fp32",
        max_shard_size=max_shard_size,
        request=request,
    )
    require_config(model_root, conversion, request)
    require_openable(model_root, conversion)
    as_stored = request is not None and request.naming.as_stored
    if has_adapter and conversion.product.kind == "model" and not as_stored:
        stored_as = replace(checkpoint, folder=model_root)  # the states have none
        return _stored(stored_as, dtype or "fp32", request), model_root

    return _converted(checkpoint, model_root, conversion), model_root


def _holds_weights_alone(checkpoint: RunCheckpoint) -> bool:
    """Whether there are no states to convert:
    by the manifest, or by what lies in the folder.

    A Trainer without DeepSpeed goes on from a model.
    """
    manifest = checkpoint.manifest
    if manifest is not None and (manifest.tag is not None or manifest.tier != "full"):
        return manifest.tier == "weights"
    return detect(checkpoint.folder).kind.holds_weights


def _root_of(folder: Path, tag: str | None) -> Path:
    """The folder with the companions of the states in a folder."""
    detection = detect(folder, tag)
    if detection.kind.name in sharded.READ:
        return detection.read().place.root
    if detection.kind.name == UNIVERSAL:
        return universal.find(folder, tag).root
    return discovery.find(folder, tag).root


def _of_pickles(
    checkpoint: RunCheckpoint, dtype: str | None, max_shard_size: int, request: Request | None
) -> Contents:
    """A model in files of torch.save, which are not published: the same as safetensors."""
    root = checkpoint.folder
    conversion = convert.plan_stored(
        root, dtype=dtype or "keep", max_shard_size=max_shard_size, request=request
    )
    require_config(root, conversion, request)
    require_openable(root, conversion)
    contents = _converted(checkpoint, root, conversion)
    note = (
        f"{root}: the weights are sent as safetensors, with the same values, as pickles "
        "are not published"
    )
    return replace(contents, warnings=(note, *contents.warnings))


def _tag_of_one_engine(checkpoint: RunCheckpoint) -> str | None:
    """The tag that the manifest names,
    if it is there; ``CheckpointError`` for several engines."""
    engine_names = engines.names(checkpoint.manifest) if checkpoint.manifest else ()
    if engine_names:
        raise CheckpointError(
            f"{checkpoint.folder} has the engines {', '.join(engine_names)}: push the "
            f"folder of one, ckpt push {shell_word(checkpoint.folder / engine_names[0])} "
            "--uncommitted",
            "unsupported",
        )

    tag = checkpoint.manifest.tag if checkpoint.manifest else None
    return tag if tag is not None and (checkpoint.folder / tag).is_dir() else None


def _converted(checkpoint: RunCheckpoint, model_root: Path, conversion: Conversion) -> Contents:
    """The files of a conversion, and what may go with them."""
    items = [Item(shard.filename, shard) for shard in conversion.plan.shards]
    if conversion.plan.index is not None:
        items.append(Item(*conversion.plan.index))
    items += [Item(name, text) for name, text in conversion.texts.items()]

    own_names = frozenset(item.name for item in items)
    allowed_files = of_conversion(
        allowed(model_root, own_names), model_root, conversion.companions, own_names
    )
    product_kind = conversion.product.kind
    if product_kind == "merged":  # the card in the checkpoint is the adapter's
        allowed_files = replace(
            allowed_files,
            files=tuple(file for file in allowed_files.files if file[0] != CARD),
        )
    items += _companion_items(checkpoint, allowed_files)

    model_facts = known.of_model(checkpoint, model_root, conversion.texts.get(ADAPTER[0]))
    if product_kind == "merged":
        model_facts = known.of_merged(model_facts, conversion.texts.get("config.json"))
    facts = {"kind": product_kind} | model_facts | known.of_conversion(conversion)
    facts["code"] = any(name.endswith(".py") for name, _ in allowed_files.files)

    return Contents(
        tuple(items),
        conversion,
        allowed_files.left_out,
        (*allowed_files.warnings, *_conversion_lines(conversion, model_root, allowed_files)),
        facts,
    )


def _conversion_lines(
    conversion: Conversion, model_root: Path, allowed_files: Allowed
) -> Iterator[str]:
    """What a conversion says, but for what is said of the files already."""
    for absence in absences.lines(conversion.product.absent):
        yield f"absent: {absence}"
    for conversion_note in conversion.notes:
        if f"{model_root}: {conversion_note}" not in allowed_files.warnings:
            yield conversion_note


def _stored(checkpoint: RunCheckpoint, dtype: str | None, request: Request | None) -> Contents:
    """Weights that lie there as they are to be published: an adapter,
    or a model's files."""
    root, warnings = checkpoint.folder, []
    is_adapter = is_adapter_folder(root)
    if is_adapter:
        require_no_pickle(root)
    file_names = list(ADAPTER) if is_adapter else weights_names(root)
    module_names = module_weights_names(root)
    items = [listed_item(checkpoint, name) for name in (*file_names, *module_names)]
    weights_paths = [root / name for name in file_names if name.endswith(".safetensors")]
    tensors = _tensors_in(weights_paths)
    module_tensors = [*_tensors_in([root / name for name in module_names]).values()]
    warnings += require_loadable(root, weights_paths[0], tensors, is_adapter, request)
    weights = quantized.marked(Weights(tensors))
    stored_type = dominant_type(
        [ref for name, ref in tensors.items() if name not in weights.packed]
    )
    if dtype not in (None, "keep") and DTYPES[dtype] is not stored_type:
        warnings.append(_type_note(root, weights_paths[0], stored_type, dtype, is_adapter))

    is_untied = request is not None and request.untie and not is_adapter
    items += _config_items(checkpoint, is_untied)
    if not is_adapter and not module_names and not os.path.lexists(root / "config.json"):
        warnings.append(f"{root} has no config.json, so from_pretrained will not load it")
    allowed_files = of_stored(root, frozenset(item.name for item in items))
    items += _companion_items(checkpoint, allowed_files)
    facts = {"kind": "adapter" if is_adapter else "weights"} | known.of_model(checkpoint, root)
    facts |= {
        "dtype": _name_of(stored_type),
        "parameters": quantized_facts.parameters(weights)
        + sum(ref.numel for ref in module_tensors),
        "total_size": sum(ref.nbytes for ref in (*tensors.values(), *module_tensors)),
        "code": any(name.endswith(".py") for name, _ in allowed_files.files),
    }

    return Contents(
        tuple(items),
        None,
        allowed_files.left_out,
        (*allowed_files.warnings, *warnings),
        facts,
    )


def _config_items(checkpoint: RunCheckpoint, is_untied: bool) -> list[Item]:
    """The config.json of a folder, if it has one."""
    if not os.path.lexists(checkpoint.folder / "config.json"):
        return []

    config_item = listed_item(checkpoint, "config.json", must_be_listed=False)
    return [_untied(config_item, checkpoint.folder) if is_untied else config_item]


def _untied(config_item: Item, root: Path) -> Item:
    """config.json that ties no embeddings, made of the one in the folder."""
    config_item.require_whole()
    content = untying.without_ties(model_folder.read_object(root / "config.json"))
    return Item(config_item.name, bounded_json.dumps(content, sort_keys=True))


def _tensors_in(paths: Sequence[Path]) -> dict[str, TensorRef]:
    """The tensors of files by name; ``CheckpointError`` for a file that is damaged."""
    return {name: ref for path in paths for name, ref in safetensors.read(path).tensors.items()}


def _name_of(stored_type: DType) -> str:
    """A type as ``--dtype`` has it, or as safetensors."""
    names = (name for name, known_type in DTYPES.items() if known_type is stored_type)
    return next(names, stored_type.value)


def _type_note(
    root: Path, weights_path: Path, stored_type: DType, dtype: str, is_adapter: bool
) -> str:
    """A line on an adapter that is sent in its own type;
    ``CheckpointError`` for a model."""
    if not is_adapter:
        raise CheckpointError(
            f"{root} holds {stored_type.value} weights and no states to make {dtype} "
            f"from; push them with {DTYPE('keep')}",
            "refused",
        )

    return f"{weights_path} is sent as it is stored, in {stored_type.value}, not as {dtype}"


def _companion_items(checkpoint: RunCheckpoint, allowed_files: Allowed) -> Iterator[Item]:
    """The files beside the weights, each with what the manifest says of it, if anything."""
    manifest_files = checkpoint.manifest.files if checkpoint.manifest else {}
    for file_name, file_path in allowed_files.files:
        yield Item(
            file_name,
            file_path,
            manifest_files.get(file_name) if file_path.parent == checkpoint.folder else None,
        )
