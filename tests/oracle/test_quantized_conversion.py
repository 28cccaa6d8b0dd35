"""Checkpoints with quantized weights: what to-fp32, open and show make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from oracles import FIXTURES, same
from safetensors.torch import load_file
from test_variants import edit, models

import ckpt
from ckpt.cli.main import cli
from ckpt.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from converters.tensors import DType

NF4 = "bitsandbytes-nf4-double-bfloat16"
STATED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def module_of(kind: str, prefix: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a quantized module, and its weight."""
    tensors = load_file(FIXTURES / "quantized" / f"{kind}.safetensors")
    expected = tensors.pop("expected")
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, expected


def checkpoint(tmp_path: Path, source: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A fixture with quantized modules in its model files, and a config.json."""
    shutil.copytree(FIXTURES / source, tmp_path / source)
    for path in models(tmp_path / source):
        edit(path, lambda state: state["module"].update(tensors))
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": STATED}
    (tmp_path / source / "config.json").write_text(json.dumps(config))
    return tmp_path / source


def convert(source: Path, *options: str) -> tuple[Path, Result]:
    output = source.with_name("out" + "".join(options))
    args = ["to-fp32", str(source), "-o", str(output), "--check", "none", *options]
    return output, CliRunner().invoke(cli, args)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    octets = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and torch.equal(*octets)


@pytest.mark.parametrize("source", ["zero2-bf16-w2", "zero3-bf16-w3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "keep"])
def test_codes_and_constants_are_copied_under_every_dtype(
    source: str, dtype: str, tmp_path: Path
) -> None:
    tensors, _ = module_of(NF4, "q")
    tensors["plain.weight"] = torch.ones(2, dtype=torch.float64)
    folder, result = convert(checkpoint(tmp_path, source, tensors), "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    found = written(folder)
    for name, tensor in tensors.items():
        if name != "plain.weight":
            assert equal(found[name], tensor), name
    assert found["plain.weight"].element_size() == {"fp32": 4, "keep": 8}.get(dtype, 2)
    line = "1 weight is quantized (bitsandbytes nf4, 5 constants): copied as stored under every"
    assert line in result.stderr
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == STATED
    names = {"bf16": "bfloat16", "fp16": "float16"}
    assert config["dtype"] == names.get(dtype, "float32")


@pytest.mark.parametrize("kind", [NF4, "bitsandbytes-int8", "compressed-int4-group-asymmetric"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "keep"])
def test_dequantize_writes_numbers_and_a_config_without_quantization(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    tensors, expected = module_of(kind, "q")
    source = checkpoint(tmp_path, "zero2-bf16-w2", tensors)
    folder, result = convert(source, "--dtype", dtype, "--dequantize")
    assert result.exit_code == 0, result.stderr
    found = written(folder)
    assert not (found.keys() & tensors.keys()) - {"q.weight"}
    if dtype == "fp32":
        rounded = found["q.weight"].to(expected.dtype)
    else:
        assert found["q.weight"].dtype == torch.bfloat16
        rounded, expected = found["q.weight"], expected.bfloat16()
    assert torch.equal(rounded, expected)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "1 weight is dequantized" in result.stderr


def test_what_has_no_formula_is_copied_and_refused_as_numbers(tmp_path: Path) -> None:
    tensors = {"q.codes": torch.ones(4, 4, dtype=torch.uint8), "q.scale": torch.ones(4).half()}
    source = checkpoint(tmp_path, "zero2-bf16-w2", tensors)
    folder, result = convert(source)
    assert equal(written(folder)["q.scale"], tensors["q.scale"])
    assert (
        "they cannot be made numbers, since of q.weight no formula is known for it" in result.stderr
    )
    _, refused = convert(source, "--dequantize")
    assert refused.exit_code == 1
    assert "q.weight is quantized (an unknown scheme) and cannot be made numbers" in str(
        refused.exception
    )


def test_constants_without_their_codes_are_said_to_be_so(tmp_path: Path) -> None:
    tensors, _ = module_of(NF4, "q")
    del tensors["q.weight"]
    source = checkpoint(tmp_path, "zero2-bf16-w2", tensors)
    _, result = convert(source, "--dtype", "bf16")
    line = "the codes of 1 quantized weight (bitsandbytes nf4) are not in the checkpoint, only 5"
    assert line in result.stderr
    shown = CliRunner().invoke(cli, ["show", str(source)]).stdout
    assert "missing      the codes of 1 quantized weight, whose constants are here" in shown
    assert "missing      nothing" not in shown


def test_a_config_that_says_nothing_of_float8_is_named(tmp_path: Path) -> None:
    tensors = {
        "q.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "q.weight_scale_inv": torch.full((1, 1), 0.5, dtype=torch.bfloat16),
    }
    source = checkpoint(tmp_path, "zero2-bf16-w2", tensors)
    (source / "config.json").write_text('{"model_type": "llama"}')
    folder, result = convert(source)
    assert all(equal(written(folder)[name], tensor) for name, tensor in tensors.items())
    assert "config.json has no quantization_config" in result.stderr
    assert json.loads((folder / "conversion.json").read_text())["loads"] is None
    folder, result = convert(source, "--dequantize")
    assert torch.equal(written(folder)["q.weight"], torch.full((4, 4), 0.5))


def test_show_counts_numbers_not_codes_or_constants(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "plain", "zero2-bf16-w2", {})
    tensors, expected = module_of(NF4, "q")
    quantized = checkpoint(tmp_path / "quantized", "zero2-bf16-w2", tensors)
    counts = []
    for source in (plain, quantized):
        result = CliRunner().invoke(cli, ["show", str(source), "--json"])
        counts.append(json.loads(result.stdout)["parameters"])
    assert counts[1] - counts[0] == expected.numel()
    shown = CliRunner().invoke(cli, ["show", str(quantized)]).stdout
    assert "quantized    1 weight (bitsandbytes nf4), 5 constants" in shown


def test_codes_are_not_cast_when_opened_or_by_deepspeeds_function(tmp_path: Path) -> None:
    tensors, _ = module_of(NF4, "q")
    source = checkpoint(tmp_path, "zero2-bf16-w2", tensors)
    state = get_fp32_state_dict_from_zero_checkpoint(source)
    with ckpt.open(source) as opened:
        for name, tensor in tensors.items():
            assert equal(opened[name], tensor), name
            assert equal(state[name], tensor), name


def test_numbers_are_the_same_after_an_interruption(tmp_path: Path) -> None:
    """A shard that is there already is compared with what would be computed now."""
    tensors, _ = module_of(NF4, "q")
    source = checkpoint(tmp_path, "zero2-bf16-w2", tensors)
    first, _ = convert(source, "--dequantize")
    second, result = convert(source, "--dequantize", "--max-shard-size", "4KB")
    assert result.exit_code == 0
    whole = written(first)
    shards = [load_file(path) for path in second.glob("model-*.safetensors")]
    assert len(shards) > 1
    assert all(same(tensor, whole[name]) for shard in shards for name, tensor in shard.items())


def test_codes_of_a_running_engine_are_not_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from ckpt.engine import inventory
    from converters.formats import safetensors

    tensors, _ = module_of("bitsandbytes-nf4-single-bfloat16", "layer")

    class Layer(torch.nn.Linear):
        def _save_to_state_dict(self, state: dict, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(state, prefix, keep_vars)
            state.update({n: t for n, t in tensors.items() if n != "layer.weight"})

    module = torch.nn.ModuleDict({"layer": Layer(4, 2, bias=False), "head": torch.nn.Linear(2, 2)})
    codes = torch.nn.Parameter(tensors["layer.weight"], requires_grad=False)
    module["layer"].weight = codes
    engine = SimpleNamespace(module=module, optimizer=None, zero_optimization_stage=lambda: 2)
    monkeypatch.setattr(inventory.dist, "get_world_size", lambda *_: 1)
    known = inventory.inventory(engine)
    assert known.weights.packed == tensors.keys()
    plan = safetensors.plan(known.weights, DType.F32, 1 << 30, "keep")
    kinds = {p.name: p.dtype for p in plan.placements()}
    assert kinds["layer.weight"] is DType.BF16 and kinds["head.weight"] is DType.F32


def test_a_model_of_numbers_has_no_quantization_in_its_configuration(tmp_path: Path) -> None:
    folder, result = convert(checkpoint(tmp_path, "zero2-bf16-w2", {}))
    assert result.exit_code == 0, result.stderr
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "loses its quantization_config" in result.stderr
