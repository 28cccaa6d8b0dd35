"""The changes that LoRA and its kin make to a layer:
shapes checked, the scale worked out."""

from __future__ import annotations

from converters import words
from converters.peft.config import AdapterConfig
from converters.peft.merge.cells import WeightChange
from converters.peft.merge.lora import AdaLora, Bias, ChatLora, Dora, Lora
from converters.peft.merge.sites import Changed, Parts, Site, find, lies_flipped, part_of, sizes
from converters.tensors import TensorRef

CHAT = ("lora_left_weight", "lora_right_weight")


def lora(site: Site, parts: Parts, config: AdapterConfig) -> Changed:
    """The changes that LoRA, or DoRA, makes to a linear layer's weight and bias.

    ``parts`` has A (r, in, ...) and B (out, r, ...), and perhaps magnitudes (out,) and a
    bias of B. ``CheckpointError`` if their shapes do not fit the layer.
    """
    factor_a, factor_b = part_of(site, parts, "lora_A"), part_of(site, parts, "lora_B")
    rank, outputs, inputs = sizes(site, factor_a, factor_b)
    scale = config.scaling(site.module, rank)
    flipped = lies_flipped(site, outputs, inputs)
    values = (site.weight, site.type_of(site.weight), factor_a, factor_b, scale, flipped)
    magnitude = find(parts, "lora_magnitude_vector")
    changes: dict[str, WeightChange] = {}
    if magnitude is None:
        changes["weight"] = Lora(*values)
    else:
        changes["weight"] = _dora(site, magnitude, outputs, Lora(*values))

    extra = parts.get(("lora_B", "bias"))
    if extra is not None:
        bias = site.tensors.get("bias")
        if bias is None or bias.shape != extra.shape:
            raise site.fail("its lora_B has a bias (lora_bias), and the layer has no such bias")
        changes["bias"] = Bias(bias, site.type_of(bias), extra, scale)

    return changes


def _dora(site: Site, magnitude: TensorRef, outputs: int, lora: Lora) -> WeightChange:
    if magnitude.numel != outputs:
        raise site.fail(
            f"its magnitudes have the shape {words.shape(magnitude.shape)}, expected "
            f"{outputs} of them"
        )

    return Dora(
        lora.weight,
        lora.dtype,
        lora.a,
        lora.b,
        lora.scale,
        lora.transposed,
        magnitude=magnitude,
        unmerged=site.unmerged,
    )


def embedding(site: Site, parts: Parts, config: AdapterConfig) -> Changed:
    """The change that LoRA, or DoRA, makes to an embedding (rows, width).

    ``parts`` has A (r, rows) and B (width, r). ``CheckpointError`` if their shapes do
    not fit the embedding.
    """
    factor_a = part_of(site, parts, "lora_embedding_A")
    factor_b = part_of(site, parts, "lora_embedding_B")
    rank, width, rows = sizes(site, factor_a, factor_b)
    if site.weight.shape != (rows, width):
        raise site.fail(
            f"it is for {rows} rows of {width}, the embedding has the shape "
            f"{words.shape(site.weight.shape)}"
        )

    scale = config.scaling(site.module, rank)
    values = (site.weight, site.type_of(site.weight), factor_a, factor_b, scale, True)
    magnitude = find(parts, "lora_magnitude_vector")
    if magnitude is not None:
        return {"weight": _dora(site, magnitude, width, Lora(*values))}

    return {"weight": Lora(*values, rounded=True)}


def ada(site: Site, parts: Parts, config: AdapterConfig) -> Changed:
    """The change that AdaLoRA makes to a layer's weight.

    ``parts`` has A (r, in), B (out, r), E (r, 1) and perhaps the number of ranks.
    ``CheckpointError`` if the shapes do not fit, or the configuration has no
    ``lora_alpha``.
    """
    factor_a, factor_b = part_of(site, parts, "lora_A"), part_of(site, parts, "lora_B")
    factor_e, ranknum = part_of(site, parts, "lora_E"), find(parts, "ranknum")
    ranks, outputs, inputs = sizes(site, factor_a, factor_b)
    if factor_e.shape != (ranks, 1) or (ranknum is not None and ranknum.numel != 1):
        raise site.fail(
            f"lora_E has the shape {words.shape(factor_e.shape)}, lora_A "
            f"{words.shape(factor_a.shape)}"
        )

    flipped = lies_flipped(site, outputs, inputs)
    rank = config.r or ranks
    alpha = config.lora_alpha
    if alpha is None:
        raise site.fail(f"{config.path} has no lora_alpha, which scales the adapter")

    scale = float(alpha) if alpha > 0 else float(rank)
    values = (site.weight, site.type_of(site.weight), factor_a, factor_b, scale, flipped)
    return {"weight": AdaLora(*values, e=factor_e, ranknum=ranknum, rank=rank)}


def chat(site: Site, parts: Parts, config: AdapterConfig) -> Changed:
    """The change that DeepSpeed-Chat's LoRA makes to a layer's weight (out, in).

    ``parts`` has the left factor (r, out) and the right one (in, r). ``CheckpointError``
    if their shapes do not fit the weight.
    """
    left, right = (part_of(site, parts, role) for role in CHAT)
    rank, outputs = left.shape if len(left.shape) == 2 else (0, 0)
    fits = site.weight.shape == (outputs, right.shape[0]) and right.shape[1:] == (rank,)
    if rank < 1 or not fits:
        raise site.fail(
            f"{CHAT[0]} has the shape {words.shape(left.shape)}, {CHAT[1]} "
            f"{words.shape(right.shape)}"
        )

    scale, dtype = config.scaling(site.module, rank), site.type_of(site.weight)
    return {"weight": ChatLora(site.weight, dtype, right, left, scale)}
