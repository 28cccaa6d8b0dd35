"""NaN and infinities in what is written are counted on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from oracles import FIXTURES
from quantizing import weights_of
from test_variants import edit, optimizers

from ckpt.cli import conversion as reports
from ckpt.cli.main import cli
from ckpt.results import WeightChecks
from converters.execute import nonfinite, shards
from converters.execute.virtual_file import Serving
from converters.formats import safetensors
from converters.tensors import DType

NAN, INF = float("nan"), float("inf")
TYPES = {
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.float32: DType.F32,
    torch.float64: DType.F64,
}


def octets(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes()))


@pytest.mark.parametrize("numeric", [False, True], ids=["plain", "numpy"])
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_pattern_of_nan_and_infinity_is_counted(kind: torch.dtype, numeric: bool) -> None:
    largest = torch.finfo(kind).max
    for values in ([], [0.0, -1.0, largest, -largest], [NAN], [-INF], [INF, -INF, NAN, -NAN, 1.0]):
        tensor = torch.tensor(values, dtype=kind)
        expected = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        assert nonfinite.count(octets(tensor), TYPES[kind], numeric) == expected, values


@pytest.mark.parametrize("numeric", [False, True], ids=["plain", "numpy"])
def test_any_bits_are_judged_as_torch_judges_them(numeric: bool) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for kind in (torch.float16, torch.bfloat16):
        for part in every.view(kind).chunk(64):
            expected = int(part.isnan().sum()), int(part.isinf().sum())
            assert nonfinite.count(octets(part), TYPES[kind], numeric) == expected


def test_integers_and_codes_have_none(tmp_path: Path) -> None:
    state = {"ids": torch.full((4,), -1), "codes": torch.full((4, 1), NAN).bfloat16()}
    weights = replace(weights_of(state, tmp_path), packed=frozenset({"codes"}))
    plan = safetensors.plan(weights, None, 1 << 30, "keep")
    found = shards.execute(plan, tmp_path, shards.CheckOptions(count_specials=True))
    assert (found.nan, found.inf) == ({}, {})


def test_they_are_counted_by_tensor_written_or_served(tmp_path: Path) -> None:
    state = {"a": torch.zeros(900_000), "b": torch.tensor([NAN, INF, 1e39]), "c": torch.ones(3)}
    state["a"][[3, 700_000]] = NAN  # in two pieces
    weights = weights_of(state, tmp_path)
    for dtype in (None, DType.BF16):
        plan = safetensors.plan(weights, dtype, 1 << 30, "keep")
        found = shards.execute(plan, tmp_path, shards.CheckOptions(count_specials=True))
        assert (found.nan, found.inf) == ({"a": 2, "b": 1}, {"b": 2})
        (tmp_path / "model.safetensors").unlink()

    serving = Serving(plan)
    with serving.open(plan.shards[0]) as shard:
        shard.read()
        shard.seek(0)
        shard.read()  # again, for a retry: counted once
        shard.check()
    served = serving.check()
    assert (served.nan, served.inf) == (found.nan, found.inf)


def test_numbers_that_become_infinite_are_told_once(tmp_path: Path) -> None:
    weights = weights_of({"a": torch.tensor([1e30, INF, 1.0])}, tmp_path)
    plan = safetensors.plan(weights, DType.F16, 1 << 30, "keep")
    found = shards.execute(
        plan, tmp_path, shards.CheckOptions(count_specials=True, allow_overflow=True)
    )
    assert (found.overflowed, found.inf) == ({"a": 1}, {"a": 1})


def test_the_user_is_told(tmp_path: Path) -> None:
    source = tmp_path / "zero3-fp32-w2"
    shutil.copytree(FIXTURES / source.name, source)

    def spoil(state: dict) -> None:
        state["optimizer_state_dict"]["fp32_flat_groups"][0].data[:3] = NAN

    edit(optimizers(source)[0], spoil)
    args = ["to-fp32", str(source), "-o", str(tmp_path / "out"), "--check", "none"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.stderr
    checks = json.loads((tmp_path / "out" / "conversion.json").read_text())["checks"]
    assert set(checks["nan"].values()) == {3}  # of a tied tensor under each name
    assert checks["inf"] == {}
    assert " NaN in " in result.stderr


def test_the_line_names_the_worst_first() -> None:
    counts = {"b": 2, "a": 10_000} | {f"x{i}": 1 for i in range(9)}
    (line,) = reports.specials(WeightChecks(verified=True, nan=counts, inf={}))
    assert line.startswith("10,011 NaN in 11 tensors: a (10,000), b (2), x0 (1)")
    assert line.endswith(" and 3 more")


def test_a_plain_copy_does_without_numpy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ckpt.cli.main import cli\n"
        f"cli(['to-fp32', {str(FIXTURES / 'zero3-fp32-w2')!r}, '-o', {str(tmp_path / 'o')!r}, "
        "'--check', 'none'], standalone_mode=False)\n"
        "assert 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
