"""Merged models equal PEFT's merge_and_unload, bit for bit where it is promised."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heavy_libraries import peft
from merging_models import Checkpoint, Convolutions, checkpoint, gpt2, llama, merge_and_unload
from oracles import ROOT
from safetensors.torch import load_file

from converters.computing import blas
from converters.execute import shards
from converters.execute import workers as mover
from converters.formats import safetensors
from converters.peft.merge import model
from converters.tensors import DType

TYPES = {"fp32": (torch.float32, DType.F32), "bf16": (torch.bfloat16, DType.BF16)}
ATTENTION = ["q_proj", "v_proj", "down_proj"]


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": ATTENTION} | changes)


# a model, and the configuration of its adapter
Case = tuple[Callable[[], torch.nn.Module], Callable[[], Any]]
KINDS: dict[str, Case] = {
    "lora": (llama, lambda: lora()),
    "patterns": (
        llama,
        lambda: lora(rank_pattern={"v_proj": 7}, alpha_pattern={"layers.1.self_attn.q_proj": 3}),
    ),
    "rslora": (llama, lambda: lora(use_rslora=True)),
    "bias": (llama, lambda: lora(bias="all")),
    "own bias": (llama, lambda: lora(bias="lora_only")),
    "lora_bias": (llama, lambda: lora(target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "embedding": (llama, lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "saved": (llama, lambda: lora(modules_to_save=["embed_tokens", "lm_head"])),
    "tokens": (llama, lambda: lora(trainable_token_indices=[1, 5, 7])),
    "conv1d": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "square conv1d": (gpt2, lambda: lora(target_modules=[r"attn.c_proj"], fan_in_fan_out=True)),
    "mixed": (gpt2, lambda: lora(target_modules=["c_fc", "c_proj", "lm_head"])),
    "adalora": (
        llama,
        lambda: peft.AdaLoraConfig(
            init_r=6, lora_alpha=12, total_step=10, target_modules=ATTENTION
        ),
    ),
    "adalora conv1d": (
        gpt2,
        lambda: peft.AdaLoraConfig(
            init_r=6, total_step=10, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "loha": (llama, lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=ATTENTION)),
    "lokr both": (
        llama,
        lambda: peft.LoKrConfig(
            r=1, alpha=6, target_modules=ATTENTION, decompose_both=True, decompose_factor=6
        ),
    ),
    "lokr whole": (llama, lambda: peft.LoKrConfig(r=64, alpha=6, target_modules=ATTENTION)),
    "ia3": (
        llama,
        lambda: peft.IA3Config(
            target_modules=["k_proj", "q_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "ia3 conv1d": (
        gpt2,
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj", "attn.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "ia3 convolutions": (
        Convolutions,
        lambda: peft.IA3Config(target_modules=["two", "three"], feedforward_modules=["three"]),
    ),
    "vera": (llama, lambda: peft.VeraConfig(r=5, target_modules=ATTENTION)),
    "vera conv1d": (
        gpt2,
        lambda: peft.VeraConfig(r=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    ),
    "layer norms": (llama, lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "only tokens": (llama, lambda: peft.TrainableTokensConfig(token_indices=[2, 9])),
}
CLOSE: dict[str, Case] = {
    "lokr": (llama, lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=ATTENTION)),
    "pointwise": (Convolutions, lambda: lora(target_modules=["point", "last"])),
    "convolutions": (Convolutions, lambda: lora(target_modules=["one", "two", "three"])),
    "dora": (llama, lambda: lora(use_dora=True)),
    "dora embedding": (
        llama,
        lambda: lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    ),
    "dora conv1d": (
        gpt2,
        lambda: lora(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "dora convolutions": (Convolutions, lambda: lora(use_dora=True, target_modules=["one", "two"])),
    "loha convolutions": (
        Convolutions,
        lambda: peft.LoHaConfig(r=3, target_modules=["one", "two"], use_effective_conv2d=True),
    ),
    "loha flat": (
        Convolutions,
        lambda: peft.LoHaConfig(r=3, target_modules=["one", "two", "point"]),
    ),
    "lokr flat": (
        Convolutions,
        lambda: peft.LoKrConfig(r=1, target_modules=["one", "two", "point"]),
    ),
    "lokr kernels": (Convolutions, lambda: peft.LoKrConfig(r=8, target_modules=["one", "two"])),
}


def ours(made: Checkpoint, dtype: DType | None, folder: Path, **options: Any) -> dict[str, Any]:
    merged = model.merged(made.weights, made.configs, dtype=dtype, **options)
    plan = safetensors.plan(merged.weights, dtype, 1 << 40, "keep")
    folder.mkdir(exist_ok=True)
    shards.execute(plan, folder)
    return load_file(folder / "model.safetensors")


def steps(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many numbers of the type lie between two tensors, at most."""
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[first.dtype]
    one, two = (
        torch.where(bits < 0, torch.iinfo(kind).min - bits, bits).long()
        for bits in (first.contiguous().view(kind), second.contiguous().view(kind))
    )
    return int((one - two).abs().max())


def both_merges(
    kind: Case, dtype: str, tmp_path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model with an adapter merged by us and by PEFT; both have the same names."""
    base, config = kind
    torch.manual_seed(1)
    made = checkpoint(base(), {"default": config()}, tmp_path)
    expected = merge_and_unload(made, TYPES[dtype][0])
    found = ours(made, TYPES[dtype][1], tmp_path / "out")
    assert found.keys() == expected.keys()
    return found, expected


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(kind: str, dtype: str, tmp_path: Path) -> None:
    found, expected = both_merges(KINDS[kind], dtype, tmp_path)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", CLOSE)
def test_merged_close_to_what_peft_merges(kind: str, dtype: str, tmp_path: Path) -> None:
    found, expected = both_merges(CLOSE[kind], dtype, tmp_path)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-6 if dtype == "fp32" else 8e-3, atol=1e-7
        )
        if dtype == "bf16":
            assert steps(found[name], value) <= 1, name


@pytest.mark.parametrize("chunk", [1 << 12, 1 << 21])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_are_the_same_for_any_cut_and_threads(
    chunk: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    made = checkpoint(llama(), {"default": lora(use_dora=True)}, tmp_path)
    expected = ours(made, DType.F32, tmp_path / "one")
    monkeypatch.setattr(mover, "MOVE_BYTES", chunk)
    monkeypatch.setattr(mover, "default_workers", lambda: workers)
    found = ours(made, DType.F32, tmp_path / "two")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_higher_ranks_merge_to_the_same_bits_in_a_process_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = lora(r=64, lora_alpha=48, target_modules=["q_proj", "v_proj", "down_proj"])
    made = checkpoint(llama(hidden_size=96, intermediate_size=200), {"default": config}, tmp_path)
    expected = merge_and_unload(made, torch.float32)
    script = """
import pickle, sys
from pathlib import Path
from converters.computing import blas
blas.prefer()
from converters.execute import shards
from converters.formats import safetensors
from converters.peft.merge import model
from converters.tensors import DType
weights, configs = pickle.loads(Path(sys.argv[1]).read_bytes())
merged = model.merged(weights, configs, dtype=DType.F32)
plan = safetensors.plan(merged.weights, DType.F32, 1 << 40, "keep")
shards.execute(plan, Path(sys.argv[2]))
"""
    (tmp_path / "made").write_bytes(pickle.dumps((made.weights, made.configs)))
    command = [sys.executable, "-c", script, str(tmp_path / "made"), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=120)

    found = load_file(tmp_path / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=1e-7)
        if blas.has_avx512():
            assert torch.equal(found[name], value), name
