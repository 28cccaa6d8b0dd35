"""A checkpoint to a model folder: locate, plan, move, and commit last (``staging``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from ckpt.folders import locks, staging
from ckpt.folders.filenames import CONVERSION
from ckpt.runs import engines
from ckpt.runs.recognition import is_numbered
from ckpt.shares import moving
from ckpt.weights.arguments import dtype_name, naming_arguments, require_choice, shard_bytes
from ckpt.weights.check import checking
from ckpt.weights.companions import absent_tokenizer, json_files
from ckpt.weights.conversion import (
    description,
    output_place,
    planning,
    sources,
    weight_files,
)
from ckpt.weights.conversion.record import ConversionRecord
from ckpt.weights.conversion.task import Conversion, Format
from ckpt.weights.naming import ties
from ckpt.weights.output.product import Product
from ckpt.weights.reader.verdict import LoadVerdict
from ckpt.weights.request import DTYPES, Request
from converters.detect import detect
from converters.detect.filenames import TRAINER_STATE
from converters.errors import CheckpointError
from converters.execute.shards import CheckOptions
from converters.options import TIED, UNTIE
from converters.plan import Plan, Tied
from converters.source import EXCLUDED, Source
from converters.storage import bounded_json, local, open_files, stores
from converters.storage.store import default_output, is_url, output_path
from converters.storage.stores import source_path
from converters.storage.url_path import absolute

if TYPE_CHECKING:
    import torch

_ARGUMENTS = (  # of plan, and the fields of its request
    *("output=", "tag=", "dtype=", "max_shard_size=", "format=", "tied=", "weights=", "check="),
    *("part=", "strip=", "rename=", "select=", "base=", "adapter_config=", "config="),
    *("tokenizer=", "layout=", "merge=True", "other_base=True", "dequantize=True", "untie=True"),
    *("exclude_frozen=True", "verify=False", "allow_overflow=True", "overwrite=True"),
)
_NAMES = {"names": "Naming(as_stored=True)", "odd_types": "unsupported_types="}


@naming_arguments(*_ARGUMENTS, **_NAMES)
@open_files.once()
def plan(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tag: str | None = None,
    dtype: str | torch.dtype = "fp32",
    max_shard_size: int | str = 5_000_000_000,
    format: Format = "safetensors",
    tied: Tied | None = None,
    request: Request | None = None,
) -> Conversion:
    """Plans the conversion of ``checkpoint`` and reads no tensor.

    ``dtype`` is a key of ``DTYPES``, or torch's type or its name; ``max_shard_size`` is
    in bytes, or "5GB". ``output`` defaults to CHECKPOINT-DTYPE, that of 16-bit weights to
    CHECKPOINT-16bit. The format "lightning" writes one file: model.ckpt in this folder,
    or ``output`` itself if it ends in .ckpt, .pt or .pth. ``CheckpointError`` for a
    checkpoint that is damaged or not supported, and for an output that its reader would
    not load.
    """
    dtype = dtype_name(dtype)
    request = replace(request or Request(), dtype=dtype, drops_ties=tied == "drop")
    if request.untie and request.drops_ties:
        raise CheckpointError(
            f"{UNTIE} does not go with {TIED('drop')}: a reader that ties nothing needs "
            "every tied tensor; leave one of them out",
            "refused",
        )

    require_choice("format", format, get_args(Format))
    require_choice("tied", tied, (None, *get_args(Tied)))

    place = source_path(checkpoint)
    output_folder = None if output is None else output_path(output)
    source = sources.read(place, tag, request)
    if format == "lightning":
        decided = _lightning(source, request, tied or "keep")
    else:
        decided = _folder(source, request, tied, format, shard_bytes(max_shard_size, "refused"))

    suffix = "16bit" if request.weights == "16bit" and dtype == "fp32" else dtype
    target = _place(_beside(place, source), output_folder, suffix)
    return _conversion(place, source, decided, target, request, format)


@open_files.once()
def plan_stored(
    folder: Path,
    *,
    dtype: str = "keep",
    max_shard_size: int | str = 5_000_000_000,
    request: Request | None = None,
) -> Conversion:
    """Plans safetensors of a folder of weights alone,
    such as one with pytorch_model.bin.

    Arguments and errors are those of ``plan``, which takes the states of a training.
    """
    request = replace(request or Request(), dtype=dtype)
    source = detect(folder).read()
    shard_size = shard_bytes(max_shard_size, "refused")
    decided = _folder(source, request, None, "safetensors", shard_size)

    output = _place(folder, None, dtype)
    return _conversion(folder, source, decided, output, request, "safetensors")


def _conversion(
    place: Path, source: Source, decided: _Decided, output: Path, request: Request, format: Format
) -> Conversion:
    return Conversion(
        checkpoint=source,
        path=place,
        product=decided.product,
        verdict=decided.verdict,
        plan=decided.plan,
        output=output,
        dtype=request.dtype,
        format=format,
        tied=decided.tied,
        notes=tuple(_notes(source, decided.product, decided.verdict)),
        option_paths=request.paths,
    )


class _Decided(NamedTuple):
    """The decisions: what is written, the verdict, the files, the fate of ties."""

    product: Product
    verdict: LoadVerdict
    plan: Plan
    tied: Tied


def _lightning(source: Source, request: Request, tied: Tied) -> _Decided:
    """The one file that Lightning loads."""
    from ckpt.weights.conversion import lightning
    from converters.formats import wrapped_state_dict

    lightning.require_every_name(source, tied)
    product = lightning.product(source, request)
    entries = lightning.entries(source).values
    dtype = DTYPES[request.dtype]
    plan = wrapped_state_dict.plan(product.weights, dtype, tied, lightning.FILE, entries)
    return _Decided(product, lightning.verdict(), plan, tied)


def _folder(
    source: Source,
    request: Request,
    tied: Tied | None,
    format: Format,
    max_shard_size: int,
) -> _Decided:
    """A model's folder, or an adapter's, checked against its reader."""
    root = source.place.root
    product = planning.product(source, request)
    if source.topology is None or not source.knows_ties:  # then no reader knows the ties
        from ckpt.weights.naming import stored_ties

        config = product.surroundings.config
        product = replace(product, weights=stored_ties.recognized(product.weights, root, config))
    spared_names = ties.chosen(product.weights, tied, root, product.surroundings.config)
    weights = ties.without_spared(product.weights, spared_names)
    verdict = checking.check(replace(product, weights=weights), root, request)

    forced = tied or "keep"
    dtype = DTYPES[request.dtype]
    plan = weight_files.planned(product, weights, dtype, max_shard_size, forced, format)
    return _Decided(product, verdict, plan, "drop" if spared_names else forced)


def _notes(source: Source, product: Product, verdict: LoadVerdict) -> Iterator[str]:
    """Notes for the user, one line each."""
    for note in source.notes:
        if product.kind not in ("adapter", "merged") or note != EXCLUDED:
            yield note
    if _is_of_other_step(source):
        from ckpt.runs.foreign import step_records  # which whole checkpoints need not

        yield from step_records.contradictions(source)

    yield from (*product.notes, *product.surroundings.notes, *verdict.notes)
    if product.kind in ("model", "merged"):
        yield from absent_tokenizer.notes(product.surroundings)

    root = source.place.root
    if others := engines.others(root):
        yield (
            f"this is the engine {root.name}; {root.parent} has {', '.join(others)} as "
            "well, each converted by its folder"
        )


def _is_of_other_step(source: Source) -> bool:
    """Whether the Trainer's state says another step than the weights."""
    path = source.place.root / TRAINER_STATE
    if source.step is None or is_url(path) or not stores.is_file(path):
        return False
    try:
        state = json_files.read(path, "a state of the Trainer", infinite=True)
    except CheckpointError:  # cut short: it says nothing of the weights
        return False
    return isinstance(state, dict) and state.get("global_step") != source.step


def _beside(path: Path, source: Source) -> Path:
    """What the output lies beside by default:
    of a tag's folder the checkpoint around it."""
    root = source.place.root
    is_tag_itself = not is_url(path) and path.resolve() == source.place.folder.resolve()
    return root if is_tag_itself and is_numbered(root) else path


def _place(checkpoint: Path, output: Path | None, suffix: str) -> Path:
    source = absolute(checkpoint)
    place = output or default_output(source, f"{source.name}-{suffix}")
    # Of "." or "/" only the whole path has a name, or none has.
    return place if place.name not in ("", "..") else absolute(place)


@naming_arguments(*_ARGUMENTS, **_NAMES)
@open_files.once()
def execute(
    conversion: Conversion,
    *,
    verify: bool = True,
    allow_overflow: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    share_count: int | None = None,
) -> ConversionRecord:
    """Writes the output folder, all at once; returns what conversion.json says.

    With ``share_count`` it makes the folder of what so many calls of ``write_share``
    wrote. After a ``CheckpointError``, nothing is left that looks finished. After an
    interruption or a full disk, the same call continues with the missing shards.
    """
    output, texts, plan = conversion.output, conversion.texts, conversion.plan
    work = work_of(conversion, verify, allow_overflow, overwrite)
    with (
        staging.as_output_error(output),
        locks.reading(conversion.checkpoint.place.folder),
        moving.moved(work, workers=workers, progress=progress, share_count=share_count) as moved,
    ):
        folder, report = moved
        record = replace(
            description.describe(conversion, report.digests),
            checks=description.checks(conversion, report, verify),
        )
        _complete(conversion, folder, texts, record)
    if conversion.is_file:
        with staging.as_output_error(output):
            staging.take_file(work.output / plan.shards[0].filename, output)
    return record


def work_of(
    conversion: Conversion, verify: bool, allow_overflow: bool, overwrite: bool
) -> moving.Work:
    """What is moved; ``CheckpointError`` where the output cannot be made."""
    checks = CheckOptions(
        verify=verify,
        exact_copies=conversion.strict,
        remedy=conversion.remedy(),
        allow_overflow=allow_overflow,
        count_specials=True,
    )
    return moving.Work(
        output=output_place.workplace(conversion, overwrite),
        plan=conversion.plan,
        nbytes=conversion.nbytes,
        checks=checks,
    )


def require_output(conversion: Conversion, overwrite: bool = False) -> None:
    """``CheckpointError`` where ``execute`` would refuse
    to make the output; makes nothing."""
    workplace = output_place.workplace(conversion, overwrite)
    staging.require_makeable(workplace, conversion.nbytes)


def continuation(conversion: Conversion) -> staging.Continuation | None:
    """The shards of an interrupted ``execute`` that this one goes on with, if any."""
    return staging.continuation(_staging_output(conversion), conversion.plan)


def shortage(conversion: Conversion) -> str | None:
    """Why the output does not fit on its disk, as a sentence; ``None`` if it does."""
    staged_folder = staging.folder_for(_staging_output(conversion))
    return staging.shortage(staged_folder, conversion.nbytes)


def _staging_output(conversion: Conversion) -> Path:
    """The folder that is made: the output, or the one that its one file is made in."""
    output = conversion.output
    return staging.folder_of_file(output) if conversion.is_file else output


def _complete(
    conversion: Conversion,
    folder: Path,
    texts: Mapping[str, bytes],
    record: ConversionRecord,
) -> None:
    """Everything beside the shards; the index and the record of the conversion last."""
    for name, path in conversion.companions.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        local.write_file(target, stores.content(path))

    for name, text in texts.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        local.write_file(target, text)

    if conversion.plan.index is not None:
        name, content = conversion.plan.index
        local.write_file(folder / name, content)

    local.write_file(folder / CONVERSION, bounded_json.dumps(record.as_json()))


def run(conversion: Conversion, **options: Any) -> dict[str, Any]:
    """``execute`` under its first name,
    whose result is the dictionary of conversion.json."""
    return execute(conversion, **options).as_json()


prepare = plan  # the first name, which stays public
