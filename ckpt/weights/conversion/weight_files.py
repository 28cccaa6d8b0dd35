"""The files that weights are cut into: their names, by kind of folder and by format."""

from __future__ import annotations

from dataclasses import replace

from ckpt.weights.output.product import Product
from converters.formats import safetensors
from converters.plan import WHOLE, Plan, Tied, joined
from converters.tensors import DType, Weights


def _torch_bin(
    weights: Weights, dtype: DType | None, max_shard_size: int, tied: Tied, pattern: str
) -> Plan:
    from converters.formats import pytorch_bin  # which few conversions need by now

    return pytorch_bin.plan(weights, dtype, max_shard_size, tied, pattern)


FORMATS = {"safetensors": safetensors.plan, "bin": _torch_bin}
_STEMS = {  # the names of the files, by kind of folder and by format
    ("model", "safetensors"): "model{suffix}.safetensors",
    ("model", "bin"): "pytorch_model{suffix}.bin",
    ("adapter", "safetensors"): "adapter_model{suffix}.safetensors",
    ("adapter", "bin"): "adapter_model{suffix}.bin",
}


def planned(
    product: Product,
    written_weights: Weights,
    dtype: DType | None,
    max_shard_size: int,
    tied: Tied,
    format: str,
) -> Plan:
    """The files of the weights, and one file for each part, whose readers know no index.

    An adapter is one file with every name, too: PEFT reads no shards. Of other weights
    those tied names are in the files that ``written_weights`` has; ``tied`` is for the
    parts.
    """
    is_adapter = product.kind == "adapter"
    write, stem = FORMATS[format], _STEMS["adapter" if is_adapter else "model", format]

    parts = {
        part.folder: write(part.weights, dtype, WHOLE, tied, _STEMS[part.kind, format])
        for part in product.parts
    }
    if parts and not product.weights.tensors:
        return joined(None, parts)

    max_bytes = WHOLE if is_adapter else max_shard_size
    weights = product.weights if is_adapter else written_weights
    main_plan = write(weights, dtype, max_bytes, "keep", stem)
    aliases = product.weights.aliases.items()
    dropped = {alias: owner for alias, owner in aliases if alias not in weights.aliases}
    main_plan = replace(main_plan, aliases=dropped)
    return joined(main_plan, parts) if parts else main_plan
