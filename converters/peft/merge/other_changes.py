"""The changes that IA3, VeRA, trained tokens,
LoHa and LoKr make to a layer: shapes checked."""

from __future__ import annotations

from converters import words
from converters.errors import CheckpointError
from converters.options import BASE, MERGE
from converters.peft.config import INPUT_EMBEDDING, AdapterConfig
from converters.peft.merge.cells import WeightChange, matrix_shape
from converters.peft.merge.lycoris import Loha, Lokr
from converters.peft.merge.sites import Changed, Parts, Site, find, part_of
from converters.peft.merge.vectors import Ia3, Tokens, Vera
from converters.peft.names import TOKENS
from converters.peft.patterns import matches
from converters.tensors import TensorRef


def otherwise() -> str:
    """The library that merges an adapter that is not merged here."""
    return f"write the adapter (without {MERGE}) and merge it with PEFT"


def ia3(site: Site, parts: Parts, shared: Parts, config: AdapterConfig) -> Changed:
    """The changes that IA3 makes to a layer's weight,
    and to its bias if it scales outputs.

    ``parts`` has a vector with one number for each input of a feedforward layer, or each
    output of another. ``CheckpointError`` if its length does not fit the layer.
    """
    vector, weight = part_of(site, parts, "ia3_l"), site.weight
    if len(vector.shape) < 2 or len(vector.shape) != len(weight.shape):
        raise site.fail(
            f"ia3_l has the shape {words.shape(vector.shape)}, the weight "
            f"{words.shape(weight.shape)}"
        )

    rows, columns = weight.shape[0], weight.shape[1]
    if len(weight.shape) == 2:
        feedforward = vector.shape[0] == 1 and vector.shape[1] != 1
        size, flipped_size = (columns, rows) if feedforward else (rows, columns)
        is_flipped = site.flipped if size == flipped_size else flipped_size == vector.numel
        fitting = vector.numel == (flipped_size if is_flipped else size)
        by_column, repeat = feedforward is not is_flipped, 1
    else:
        feedforward = _feedforward(config, site.module)
        fitting = vector.numel == (columns if feedforward else rows)
        by_column, repeat = feedforward, matrix_shape(weight.shape)[1] // max(columns, 1)

    if not fitting:
        raise site.fail(
            f"ia3_l has the shape {words.shape(vector.shape)}, the weight "
            f"{words.shape(weight.shape)}"
        )

    changes: dict[str, WeightChange] = {
        "weight": Ia3(weight, site.type_of(weight), vector, by_column, repeat)
    }
    bias = site.tensors.get("bias")
    if bias is not None and not feedforward:
        if bias.numel != vector.numel:
            raise site.fail(
                f"ia3_l has the shape {words.shape(vector.shape)}, the bias "
                f"{words.shape(bias.shape)}"
            )
        changes["bias"] = Ia3(bias, site.type_of(bias), vector, False)

    return changes


def _feedforward(config: AdapterConfig, module: str) -> bool:
    """Whether IA3 scales a layer's input:
    by the ends of names, or a pattern of the whole."""
    targets = config.values.get("feedforward_modules") or []
    if isinstance(targets, str):
        return matches(targets, module)
    return any(isinstance(target, str) and module.endswith(target) for target in targets)


def vera(site: Site, parts: Parts, shared: Parts, config: AdapterConfig) -> Changed:
    """The change that VeRA makes to a layer's weight, a matrix.

    ``shared`` has the adapter's matrices A and B, of which a layer uses as many columns
    and rows as it needs. ``CheckpointError`` if the checkpoint lacks them, or shapes do
    not fit.
    """
    lambda_b = part_of(site, parts, "vera_lambda_b")
    lambda_d = part_of(site, parts, "vera_lambda_d")
    large_a, large_b = find(shared, "vera_A"), find(shared, "vera_B")
    if large_a is None or large_b is None:
        raise CheckpointError(
            "the shared matrices of VeRA are not in the checkpoint (save_projection is "
            f"false): PEFT makes them of the configuration's seed; {otherwise()}",
            "unsupported",
        )

    shape = site.weight.shape
    if len(shape) != 2 or lambda_b.numel not in shape:
        raise site.fail(
            f"vera_lambda_b has the shape {words.shape(lambda_b.shape)}, the weight "
            f"{words.shape(shape)}"
        )

    flipped = site.flipped if shape[0] == shape[1] else shape[0] != lambda_b.numel
    inputs = shape[0] if flipped else shape[1]
    are_matrices = len(large_a.shape) == len(large_b.shape) == 2
    fits = are_matrices and len(lambda_b.shape) == len(lambda_d.shape) == 1
    if fits:
        enough = large_a.shape[1] >= inputs and large_b.shape[0] >= lambda_b.numel
        fits = enough and large_a.shape[0] == large_b.shape[1] == lambda_d.numel

    if not fits:
        raise site.fail(
            f"vera_A has the shape {words.shape(large_a.shape)}, vera_B "
            f"{words.shape(large_b.shape)}"
        )

    dtype = site.type_of(site.weight)
    return {"weight": Vera(site.weight, dtype, large_a, large_b, lambda_b, lambda_d, flipped)}


def tokens(site: Site, parts: Parts, shared: Parts, config: AdapterConfig) -> Changed:
    """The change that trained tokens make to an embedding (rows, width).

    ``parts`` has the trained rows, in the order of the indices that the configuration
    names. ``CheckpointError`` if they do not fit the embedding, or lie beyond its end.
    """
    rows = part_of(site, parts, TOKENS)
    indices = token_indices(config, site.module, rows)
    shape = site.weight.shape
    if indices is None or len(shape) != 2 or rows.shape != (len(indices), shape[1]):
        raise site.fail(
            f"it has trained rows of shape {words.shape(rows.shape)}, and {config.path} names "
            f"{0 if indices is None else len(indices)} rows of the weight, which has the "
            f"shape {words.shape(shape)}"
        )
    if any(not 0 <= index < shape[0] for index in indices):
        raise site.fail(
            f"row {max(indices)} was trained, and the weight has {shape[0]} rows: the "
            "vocabulary was resized for the training, and neither the states nor the "
            "adapter's own file have the resized embedding; load the base model, resize "
            f"it as the training did (resize_token_embeddings, to {max(indices) + 1} rows "
            f"at least), save it, and name that folder with {BASE}"
        )

    return {"weight": Tokens(site.weight, site.type_of(site.weight), rows, indices)}


def token_indices(
    config: AdapterConfig,
    module: str,
    rows: TensorRef,
) -> tuple[int, ...] | None:
    """The numbers of a layer's trained rows: those named for the layer,
    or the only ones."""
    indices_by_layer = config.token_indices
    for layer, indices in indices_by_layer.items():
        if layer != INPUT_EMBEDDING and (module == layer or module.endswith(f".{layer}")):
            return indices

    if INPUT_EMBEDDING in indices_by_layer:
        return indices_by_layer[INPUT_EMBEDDING]
    return next(iter(indices_by_layer.values())) if len(indices_by_layer) == 1 else None


def loha(site: Site, parts: Parts, config: AdapterConfig) -> Changed:
    """The change that LoHa makes to a layer's weight.

    ``parts`` has two pairs of factors, each perhaps with a core for a convolution.
    ``CheckpointError`` if a product of them does not have the weight's shape.
    """
    core, second_core = find(parts, "hada_t1"), find(parts, "hada_t2")
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    factors = [part_of(site, parts, name) for name in names]
    for factor_a, factor_b in (factors[:2], factors[2:]):
        _require_product(site, factor_a, factor_b, core)

    if (core is None) is not (second_core is None):
        raise site.fail("one of hada_t1 and hada_t2 is missing")

    rank = factors[0].shape[0] if core is not None else factors[0].shape[1]
    scale = alpha_of(site, config) / rank
    weight = site.weight
    first_a, first_b, second_a, second_b = factors

    return {
        "weight": Loha(
            weight,
            site.type_of(weight),
            first_a,
            first_b,
            second_a,
            second_b,
            scale,
            core,
            second_core,
        )
    }


def _require_product(
    site: Site, factor_a: TensorRef, factor_b: TensorRef, core: TensorRef | None
) -> None:
    """Raises unless the product of two factors,
    through a core perhaps, has the weight's shape."""
    rows, columns = matrix_shape(site.weight.shape)
    factors = (factor_a, factor_b) if core is None else (factor_a, factor_b, core)
    shape = _product_shape(factors)
    if shape is None or matrix_shape(shape) != (rows, columns):
        raise site.fail(
            f"factors of {words.shape(factor_a.shape)} and {words.shape(factor_b.shape)} do "
            f"not give {words.shape(site.weight.shape)}"
        )


def _product_shape(factors: tuple[TensorRef, ...]) -> tuple[int, ...] | None:
    """The shape of a whole matrix, a product,
    or a product through a core; ``None`` if of none."""
    shapes = [tensor.shape for tensor in factors]
    if len(shapes) == 1:
        return shapes[0] if len(shapes[0]) >= 2 else None

    shape_a, shape_b = shapes[:2]
    if len(shape_a) != 2 or len(shape_b) != 2:
        return None
    if len(shapes) == 2:
        return (shape_a[0], shape_b[1]) if shape_a[1] == shape_b[0] else None

    core = shapes[2]
    fits = len(core) == 4 and core[:2] == (shape_a[0], shape_b[0])
    return (shape_a[1], shape_b[1], *core[2:]) if fits else None


def lokr(site: Site, parts: Parts, config: AdapterConfig) -> Changed:
    """The change that LoKr makes to a layer's weight:
    a Kronecker product of two matrices.

    ``parts`` has each of them whole or as factors. ``CheckpointError`` if the product
    does not have the weight's shape, or the configuration has no rank.
    """
    first = _either(site, parts, "lokr_w1")
    second = _either(site, parts, "lokr_w2")
    core = find(parts, "lokr_t2")
    if core is not None and len(second) == 2:
        second = (*second, core)

    left_shape, right_shape = _product_shape(first), _product_shape(second)
    if left_shape is None or right_shape is None or len(left_shape) != 2:
        raise site.fail("the factors of LoKr do not fit together")

    weight = site.weight
    shape = (left_shape[0] * right_shape[0], left_shape[1] * matrix_shape(right_shape)[1])
    fits = len(right_shape) == 3 or shape == matrix_shape(weight.shape)
    if shape[0] * shape[1] != weight.numel or not fits:
        raise site.fail(
            f"its factors give {words.shape(shape)}, the weight has the shape "
            f"{words.shape(weight.shape)}"
        )

    if len(first) == 2:
        rank = first[0].shape[1]
    elif len(second) > 1:
        rank = second[1].shape[0]
    else:
        rank = config.rank(site.module)

    if type(rank) is not int or rank < 1:
        raise site.fail(f"{config.path} has no rank r, which scales the adapter")

    scale = alpha_of(site, config) / rank
    return {"weight": Lokr(weight, site.type_of(weight), first, second, scale)}


def _either(site: Site, parts: Parts, role: str) -> tuple[TensorRef, ...]:
    """A matrix that is whole, or its two factors."""
    matrix = find(parts, role)
    if matrix is not None:
        return (matrix,)
    return part_of(site, parts, f"{role}_a"), part_of(site, parts, f"{role}_b")


def alpha_of(site: Site, config: AdapterConfig) -> float:
    """The configuration's alpha for a layer; ``CheckpointError`` if it has none."""
    alpha = config.alpha(site.module)
    if alpha is None:
        raise site.fail(f"{config.path} has no alpha, which scales the adapter")
    return alpha
