"""Codes of quantizations: which tensors they are, and the numbers that libraries make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import FIXTURES
from quantizing import awq, gptq, numbers, weights_of
from safetensors.torch import load_file

from ckpt.weights import parts
from converters import quantized
from converters.errors import CheckpointError
from converters.tensors import DType, TensorRef

LIBRARIES = sorted((FIXTURES / "quantized").glob("*.safetensors"))
RNG = np.random.default_rng(0)


def codes_of(*shape: int, bits: int = 8) -> np.ndarray:
    return RNG.integers(0, 1 << bits, shape)


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_numbers_are_those_of_the_library(path: Path, tmp_path: Path) -> None:
    state = load_file(path)
    expected = state.pop("expected")
    weights = weights_of({f"layer.{name}": value for name, value in state.items()}, tmp_path)
    (group,) = quantized.groups(weights)
    assert set(group.names) == set(weights.tensors)
    exact = DType.F32 if expected.dtype == torch.float32 else None
    made = quantized.dequantized(weights, dtype=exact).tensors
    assert list(made) == ["layer.weight"]
    assert torch.equal(numbers(made["layer.weight"]), expected.float())


def test_numbers_are_those_of_the_installed_bitsandbytes(tmp_path: Path) -> None:
    from bitsandbytes import functional

    for double in (False, True):
        weight = torch.randn(9, 64)
        codes, state = functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=double
        )
        parts = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
        made = quantized.dequantized(weights_of({"w": codes} | parts, tmp_path)).tensors["w"]
        assert torch.equal(numbers(made), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((6, 8), ()),
        ((6, 8), (1,)),
        ((6, 8), (6,)),
        ((6, 8), (6, 1)),
        ((6, 8), (1, 1)),
        ((200, 300), (2, 3)),
        ((6, 64), (6, 4)),
        ((3, 140, 130), (3, 2, 2)),
        ((3, 6, 8), (3, 1, 8)),
    ],
    ids=str,
)
def test_float8_is_scaled_by_tensor_row_group_or_block(
    shape: tuple[int, ...], scale: tuple[int, ...], tmp_path: Path
) -> None:
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(scale) + 0.5
    made = quantized.dequantized(
        weights_of({"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path)
    ).tensors
    wide = scales.reshape(scales.shape + (1,) * (len(shape) - len(scale))) if scale else scales
    for axis, size in enumerate(shape if len(scale) == len(shape) else ()):
        block = 128 if -(-size // 128) == wide.shape[axis] else size // wide.shape[axis]
        block = size if wide.shape[axis] == 1 else block
        wide = wide.repeat_interleave(block, axis).narrow(axis, 0, size)
    assert torch.equal(numbers(made["a.weight"]), codes.float() * wide)


@pytest.mark.parametrize("form", ["float8_e8m0fnu", "uint8"])
def test_scales_may_be_powers_of_two(form: str, tmp_path: Path) -> None:
    codes = torch.randn(4, 64).to(torch.float8_e5m2)
    exponents = torch.tensor([[120, 130], [127, 128], [1, 254], [126, 125]], dtype=torch.uint8)
    scales = exponents.view(getattr(torch, form))
    made = quantized.dequantized(
        weights_of({"weight": codes, "weight_scale_inv": scales}, tmp_path)
    ).tensors["weight"]
    powers = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(numbers(made), codes.float() * powers)


def test_the_configuration_says_how_large_a_block_is(tmp_path: Path) -> None:
    codes, scales = torch.randn(10, 10).to(torch.float8_e4m3fn), torch.rand(4, 4)
    weights = weights_of({"weight": codes, "weight_scale_inv": scales}, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"weight is quantized \(float8 with weight_scale_inv"
    ):
        quantized.dequantized(weights)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [3, 3]}}
    made = quantized.dequantized(weights, config).tensors["weight"]
    wide = scales.repeat_interleave(3, 0).repeat_interleave(3, 1)[:10, :10]
    assert torch.equal(numbers(made), codes.float() * wide)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits: int, version: str, tmp_path: Path) -> None:
    inputs, outputs, groups = 64, 32, 4
    codes, zeros = codes_of(inputs, outputs, bits=bits), codes_of(groups, outputs, bits=bits)
    shift = int(version == "gptq")
    zeros = np.maximum(zeros, shift)
    qweight, qzeros = gptq(codes, zeros, bits, shift=shift)
    index = RNG.permutation(np.arange(inputs) * groups // inputs).astype(np.int32)
    scales = torch.rand(groups, outputs).half()
    state = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    state["g_idx"] = torch.from_numpy(index)
    weights = weights_of({f"q.{name}": value for name, value in state.items()}, tmp_path)
    config = {"quantization_config": {"bits": bits, "checkpoint_format": version}}
    made = quantized.dequantized(weights, config, None).tensors["q.weight"]
    whole = torch.from_numpy(codes - zeros[index]).half() * scales[index.tolist()]
    assert made.dtype is DType.F16
    assert torch.equal(numbers(made), whole.T.float())


def test_awq(tmp_path: Path) -> None:
    inputs, outputs, groups = 64, 48, 2
    codes, zeros = codes_of(inputs, outputs, bits=4), codes_of(groups, outputs, bits=4)
    qweight, qzeros = awq(codes, zeros)
    scales = torch.rand(groups, outputs).half()
    state = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    weights = weights_of({f"q.{name}": value for name, value in state.items()}, tmp_path)
    made = quantized.dequantized(weights).tensors["q.weight"]
    index = np.arange(inputs) // 32
    whole = torch.from_numpy(codes - zeros[index]) * scales.float()[index.tolist()]
    assert torch.equal(numbers(made), whole.T.float())


def test_the_experts_of_gpt_oss(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.from_numpy(codes_of(3, 10, 2, 16).astype(np.uint8))
    scales = torch.from_numpy(RNG.integers(118, 136, (3, 10, 2)).astype(np.uint8))
    state = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    state["experts.down_proj_bias"] = torch.ones(3, 10)
    made = quantized.dequantized(weights_of(state, tmp_path)).tensors
    assert list(made) == ["experts.down_proj", "experts.down_proj_bias"]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(numbers(made["experts.down_proj"]), expected)


def test_groups_out_of_range_are_damage_not_another_weight(tmp_path: Path) -> None:
    qweight, qzeros = gptq(codes_of(32, 8, bits=4), codes_of(2, 8, bits=4) + 1, 4)
    state = {"qweight": qweight, "qzeros": qzeros, "scales": torch.ones(2, 8).half()}
    state["g_idx"] = torch.full((32,), 5, dtype=torch.int32)
    weights = weights_of({f"q.{name}": value for name, value in state.items()}, tmp_path)
    with pytest.raises(CheckpointError, match="expected 0 to 1"):
        numbers(quantized.dequantized(weights).tensors["q.weight"])


FLOAT, BYTES = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.uint8)
INTS = torch.ones(4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    "state",
    [
        {"weight": FLOAT, "scales": FLOAT, "weight_scale": FLOAT},
        {"weight": FLOAT, "absmax": FLOAT},
        {"qweight": FLOAT, "scales": FLOAT},
        {"bias": BYTES, "masked_bias": FLOAT, "scale": FLOAT},
        {"relative_position_index": INTS.long(), "logit_scale": FLOAT},
        {"num_batches_tracked": INTS, "running_scale": FLOAT},
        {"weight": FLOAT, "weight.scale": FLOAT},
    ],
    ids=lambda state: "-".join(state),
)
def test_ordinary_tensors_are_no_codes(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights = weights_of({f"a.{name}": value for name, value in state.items()}, tmp_path)
    assert not quantized.groups(weights)
    assert quantized.marked(weights) is weights


def test_trained_scales_are_cast(tmp_path: Path) -> None:
    """Codes are frozen, but a method may train what scales them."""
    qweight, qzeros = gptq(codes_of(32, 8, bits=4), codes_of(2, 8, bits=4) + 1, 4)
    state = {"qweight": qweight, "qzeros": qzeros, "scales": torch.ones(2, 8)}
    frozen = frozenset({"qweight", "qzeros"})
    weights = quantized.marked(weights_of(state, tmp_path, frozen=frozen))
    assert weights.packed == frozen


@pytest.mark.parametrize(
    "state",
    [
        {"W_q": BYTES, "scale": FLOAT, "zero": FLOAT},  # HQQ
        {"W_q": FLOAT.bfloat16(), "scale": FLOAT, "zero": FLOAT, "shape": INTS[0]},  # HQQ as floats
        {"weight._data": BYTES.to(torch.int8), "weight._scale": FLOAT},  # quanto
        {"_weight_qdata": BYTES.to(torch.int8), "_weight_scale": FLOAT},  # torchao
        {"codes": BYTES, "codebooks": FLOAT, "scales": FLOAT},  # AQLM
        {"weight": BYTES.to(torch.int8), "weight_scales": FLOAT[0].half()},  # EETQ
        {"weight": BYTES, "weight_scale": FLOAT[0]},  # BitNet
        {"qweight": INTS, "scales": FLOAT.half(), "B_24": FLOAT.half()},  # Marlin
    ],
    ids=lambda state: "-".join(state),
)
def test_codes_without_a_known_formula_are_marked_and_refused_as_numbers(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = {f"a.{name}": value for name, value in state.items()}
    weights = quantized.marked(weights_of(state, tmp_path))
    assert weights.packed >= state.keys() - {"a.B_24"}
    with pytest.raises(CheckpointError, match=r"cannot be made numbers: .*--dequantize it"):
        quantized.dequantized(weights)


def test_float8_under_a_quantization_is_no_number(tmp_path: Path) -> None:
    state = {"a.weight": FLOAT.to(torch.float8_e4m3fn), "a.bias": FLOAT}
    weights = weights_of(state, tmp_path)
    assert not quantized.marked(weights).packed
    config = {"quantization_config": {"quant_method": "fp8"}}
    assert quantized.marked(weights, config).packed == {"a.weight"}


def test_scales_of_the_cache_are_constants_under_a_quantization(tmp_path: Path) -> None:
    weights = weights_of({"attn.k_scale": FLOAT, "attn.weight": FLOAT}, tmp_path)
    assert not quantized.marked(weights).packed
    config = {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}
    assert quantized.marked(weights, config).packed == {"attn.k_scale"}
    assert list(quantized.dequantized(weights, config).tensors) == ["attn.weight"]


def test_four_bits_stored_as_floats_without_their_state_are_codes(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(8, 1).bfloat16(), "b.weight": torch.ones(8, 1).bfloat16()}
    weights = weights_of(state, tmp_path, frozen=frozenset({"a.weight"}))
    config = {"quantization_config": {"load_in_4bit": True}}
    assert quantized.marked(weights, config).packed >= {"a.weight"}
    assert not quantized.marked(weights).packed


@pytest.mark.parametrize("role", ["scale", "scale_weight"])
def test_the_factor_of_float8_may_have_a_short_name(role: str, tmp_path: Path) -> None:
    codes, scale = torch.randn(4, 6).to(torch.float8_e4m3fn), torch.tensor(0.25)
    weights = weights_of({"a.weight": codes, f"a.{role}": scale}, tmp_path)
    made = quantized.dequantized(weights).tensors
    assert list(made) == ["a.weight"]
    assert torch.equal(numbers(made["a.weight"]), codes.float() * 0.25)


def test_the_rest_of_the_model_stays_as_it_is(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "quantized" / "bitsandbytes-nf4-double-uint8.safetensors")
    del tensors["expected"]
    state = {"first": FLOAT} | {f"b.{name}": value for name, value in tensors.items()}
    state |= {"last": FLOAT, "c.weight.absmax": FLOAT, "c.weight.quant_map": FLOAT}
    weights = weights_of(state, tmp_path, frozen=frozenset({"b.weight"}))
    made = quantized.dequantized(weights)
    assert list(made.tensors) == list(made.order) == ["first", "b.weight", "last"]
    assert made.frozen == {"b.weight"} and not made.packed
    assert isinstance(made.tensors["first"], TensorRef)
    assert made.tensors["b.weight"].shape == (20, 64)


def test_tied_constants_belong_to_each_of_their_weights(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "quantized" / "bitsandbytes-nf4-single-uint8.safetensors")
    del tensors["expected"]
    state = {f"{layer}.{name}": v for layer in "ab" for name, v in tensors.items()}
    shared = state.pop("b.weight.quant_map")
    weights = weights_of(state, tmp_path)
    aliases = {"b.weight.quant_map": "a.weight.quant_map"}
    weights = type(weights)(weights.tensors, aliases, checksums=weights.checksums)
    made = quantized.dequantized(weights)
    assert shared is not None and not made.aliases
    assert torch.equal(numbers(made.tensors["a.weight"]), numbers(made.tensors["b.weight"]))


@pytest.mark.parametrize(
    "state", [b"no json", b"{}", b"[1]", b'{"shape": [9999999999, 9], "blocksize": 64}'], ids=str
)
def test_a_damaged_state_is_no_traceback(state: bytes, tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "quantized" / "bitsandbytes-nf4-single-uint8.safetensors")
    del tensors["expected"]
    raw = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = raw
    with pytest.raises(CheckpointError, match=r"weight is quantized .* cannot be made numbers"):
        quantized.dequantized(weights_of(tensors, tmp_path))


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"m.q.qweight": INTS, "m.q.qzeros": INTS, "m.q.scales": FLOAT.half()}, ["m.q.weight"]),
        ({"m.q.weight": BYTES.to(torch.int8), "m.q.SCB": FLOAT[0]}, ["m.q.weight"]),
        ({"m.w.weight._data": INTS, "m.w.weight._scale": FLOAT}, ["m.w.weight"]),
        ({"m.e_blocks": BYTES, "m.e_scales": BYTES[0], "m.e_bias": FLOAT}, ["m.e", "m.e_bias"]),
        ({"m.q.weight_packed": INTS, "m.q.weight_scale": FLOAT}, ["m.q.weight"]),
    ],
    ids=["gptq", "int8", "quanto", "mxfp4", "compressed"],
)
def test_a_reader_knows_codes_by_the_name_of_their_weight(
    state: dict[str, torch.Tensor], names: list[str], tmp_path: Path
) -> None:
    state = {f"pre.{name}": value for name, value in state.items()}
    weights = quantized.marked(weights_of(state, tmp_path))
    assert parts.read_names(weights) == [f"pre.{name}" for name in names]
    changes = {name: name.removeprefix("pre.") for name in state}
    assert parts.read_names(weights, changes) == names
