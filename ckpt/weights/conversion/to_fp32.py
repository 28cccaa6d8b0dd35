"""``ckpt.to_fp32``: the command ``ckpt to-fp32`` as one function."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ckpt.results import WeightChecks
from ckpt.runs.states import newest
from ckpt.weights.arguments import naming_arguments, require_choice
from ckpt.weights.conversion import convert
from ckpt.weights.conversion.record import ConversionRecord
from ckpt.weights.conversion.task import Format
from ckpt.weights.request import Check, Layout, Masters, Names, Naming, Request
from converters.computing import blas
from converters.plan import Tied
from converters.storage.store import local_path

if TYPE_CHECKING:
    import torch

AnyPath = str | os.PathLike[str]
OddTypes = Literal["skip", "raw"]
_ARGUMENTS = (
    *(
        "output=",
        "tag=",
        "last=True",
        "dtype=",
        "max_shard_size=",
        "format=",
        "tied=",
        "exclude_frozen=True",
    ),
    *("weights=", "names=", "layout=", "part=", "tp_rules=", "strip=", "rename=", "select="),
    *("merge=True", "base=", "other_base=True", "adapter_config=", "config=", "tokenizer="),
    *("dequantize=True", "check="),
    *("untie=True", "odd_types=", "verify=False", "allow_overflow=True", "overwrite=True"),
)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ConvertedModel:
    """A model folder that was written,
    or a file for Lightning; it can be used as a path.

    ``path`` is where it lies, ``record`` what conversion.json says of it. ``remark``
    says which checkpoint of a run was taken.
    """

    path: Path
    record: ConversionRecord
    remark: str | None = None

    @property
    def checks(self) -> WeightChecks:
        """The proofs for the weights."""
        assert self.record.checks is not None
        return self.record.checks

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of weights."""
        if self.path.is_file():
            return (self.path,)
        return tuple(self.path / file.name for file in self.record.files)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a user should know, one line each."""
        return self.record.notes if self.remark is None else (self.remark, *self.record.notes)

    @property
    def verdict(self) -> str:
        """Whether the output loads in its reader, in words."""
        return self.record.verdict

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        """The path, as functions take it that want text."""
        return str(self.path)

    def __repr__(self) -> str:
        """One short line, whatever the number of tensors."""
        return f"<ConvertedModel {str(self.path)!r}: {self.record.tensors:,} tensors>"


@naming_arguments(*_ARGUMENTS)
def to_fp32(
    checkpoint: AnyPath,
    output: AnyPath | None = None,
    *,
    tag: str | None = None,
    last: bool = False,
    dtype: str | torch.dtype = "fp32",
    max_shard_size: int | str = "5GB",
    format: Format = "safetensors",
    tied: Tied | None = None,
    exclude_frozen: bool = False,
    weights: Masters = "fp32",
    names: Names = "reader",
    layout: Layout = "hub",
    part: str | None = None,
    tp_rules: AnyPath | None = None,
    strip: str | Sequence[str] = (),
    rename: str | Mapping[str, str] | Sequence[str | tuple[str, str]] = (),
    select: str | Sequence[str] = (),
    merge: bool = False,
    base: AnyPath | None = None,
    other_base: bool = False,
    adapter_config: AnyPath | None = None,
    config: AnyPath | None = None,
    tokenizer: AnyPath | None = None,
    dequantize: bool = False,
    check: Check = "auto",
    untie: bool = False,
    odd_types: OddTypes = "skip",
    verify: bool = True,
    allow_overflow: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ConvertedModel:
    """Converts a checkpoint to a model folder that ``from_pretrained`` loads,
    and prints nothing.

    Everything is as in ``ckpt to-fp32``, whose options the arguments are. ``dtype`` is
    "fp32", "bf16", "fp16" or "keep", torch's type or torch's name of it ("bfloat16").
    ``max_shard_size`` is in bytes, or "5GB". ``output`` defaults to CHECKPOINT-DTYPE.
    ``last`` takes the newest checkpoint of the run at ``checkpoint`` that is committed
    or complete. ``progress`` is called with numbers of bytes as they are written.

    ``CheckpointError`` if the checkpoint is damaged, not supported or would not load,
    or if the output cannot be made; nothing is left then that looks finished. After an
    interruption or a full disk, the same call continues with the missing shards.
    """
    _require_choices(weights, names, check, odd_types, layout)
    _prefer_blas(merge)
    request = Request(
        naming=Naming.of(strip, rename, select, part).with_names(names),
        weights=weights,
        merge=merge,
        base=_local(base),
        other_base=other_base,
        adapter_config=_local(adapter_config),
        config=_local(config),
        tokenizer=_local(tokenizer),
        dequantize=dequantize,
        check=check,
        untie=untie,
        unsupported_types=odd_types,
        exclude_frozen=exclude_frozen,
        layout=layout,
        tp_rules=_local(tp_rules),
    )
    place, remark = newest.choose(checkpoint, tag, last)
    conversion = convert.plan(
        place,
        output,
        tag=tag,
        dtype=dtype,
        max_shard_size=max_shard_size,
        format=format,
        tied=tied,
        request=request,
    )
    record = convert.execute(
        conversion,
        verify=verify,
        allow_overflow=allow_overflow,
        overwrite=overwrite,
        workers=workers,
        progress=progress or (lambda _: None),
    )

    return ConvertedModel(path=conversion.output, record=record, remark=remark)


def _prefer_blas(merge: bool) -> None:
    """Before anything loads numpy: merged models have the bits that PEFT's have."""
    if merge:
        blas.prefer()


def _require_choices(
    weights: object, names: object, check: object, odd_types: object, layout: object
) -> None:
    """``CheckpointError`` for a word that an option does not have."""
    require_choice("weights", weights, get_args(Masters))
    require_choice("names", names, get_args(Names))
    require_choice("check", check, get_args(Check))
    require_choice("odd_types", odd_types, get_args(OddTypes))
    require_choice("layout", layout, get_args(Layout))


def _local(path: AnyPath | None) -> Path | None:
    return None if path is None else local_path(path)
