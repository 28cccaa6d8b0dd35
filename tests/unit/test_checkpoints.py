"""Every real checkpoint, against the values the live engine held when it saved."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from oracles import (
    FIXTURES,
    REFUSED,
    SHARED_CORPUS,
    convert,
    corpus,
    live,
    made,
    raised,
    root_of,
    run,
    same,
    weights_in,
)

# Names that these checkpoints do not hold: frozen parameters that were excluded on request.
EXCLUDED = ("exclude-frozen", "s3xf")
TRAINERS = [FIXTURES / "trainer-zero2", FIXTURES / "trainer-zero3"]


def compare(save_dir: Path, weights: dict[str, torch.Tensor], record: dict) -> None:
    truth = live(save_dir)
    masters, values = truth.get("fp32", {}), truth.get("live", {})
    found = weights | {alias: weights[owner] for alias, owner in record["aliases"].items()}
    for name, value in masters.items():
        assert same(found[name], value.float()), name
    for name, value in values.items():
        if name in masters and not value.numel():
            continue
        if name not in found and any(mark in save_dir.name for mark in EXCLUDED):
            assert "frozen" in name
        elif name in masters or name not in found:
            assert same(found[name].to(value.dtype), value), name
        else:  # fp32 that is only known to round to it, or a frozen parameter raised to fp32
            assert same(found[name].to(value.dtype), value), name
            assert found[name].dtype == torch.float32
    for name, value in truth.get("buffer", {}).items():
        if not name.startswith("np_"):
            assert same(raised(found[name]).to(raised(value).dtype), raised(value)), name
    known = masters.keys() | values.keys() | truth.get("buffer", {}).keys()
    assert found.keys() <= known


@pytest.mark.parametrize("save_dir", [*made(), *corpus(), *TRAINERS], ids=lambda path: path.name)
def test_a_real_checkpoint_gives_the_live_engines_weights(save_dir: Path, tmp_path: Path) -> None:
    weights = convert(root_of(save_dir), tmp_path / "model")
    record = json.loads((tmp_path / "model/conversion.json").read_text())
    if live(save_dir):
        compare(save_dir, weights, record)
    assert record["absent"] == {}
    assert record["checks"]["verified"]
    assert not record["checks"]["unlike_tensors"]


@pytest.mark.parametrize("save_dir", [*made(), *TRAINERS], ids=lambda path: path.name)
def test_sixteen_bits_are_rounded_as_torch_rounds_them(save_dir: Path, tmp_path: Path) -> None:
    exact = convert(root_of(save_dir), tmp_path / "exact", "--dtype", "keep")
    buffers = live(save_dir).get("buffer", {})
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        found = convert(root_of(save_dir), tmp_path / dtype, "--dtype", dtype)
        assert found.keys() == exact.keys()
        for name, value in exact.items():
            as_is = name in buffers or not value.is_floating_point()
            assert same(found[name], value if as_is else value.to(expected)), (dtype, name)


@pytest.mark.parametrize("save_dir", made()[::5], ids=lambda path: path.name)
def test_both_formats_and_any_shard_size_hold_the_same_weights(
    save_dir: Path, tmp_path: Path
) -> None:
    whole = convert(save_dir, tmp_path / "whole")
    for number, options in enumerate(
        (
            ("--max-shard-size", "300B"),
            ("--format", "bin"),
            ("--format", "bin", "--max-shard-size", "1KB"),
        )
    ):
        folder = tmp_path / str(number)
        found = convert(save_dir, folder, *options)
        assert found.keys() == whole.keys()
        assert all(same(found[name], whole[name]) for name in whole)


def test_swapped_subgroups_come_from_nvme(tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / "zero3-nvme.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    save_dir = next(path for path in tmp_path.iterdir() if path.is_dir())
    weights = convert(save_dir, tmp_path / "model")
    record = json.loads((tmp_path / "model/conversion.json").read_text())
    compare(save_dir, weights, record)
    swapped = sum(w.nbytes for name, w in live(save_dir)["fp32"].items() if _decays(name))
    assert record["checks"]["no_crc32_bytes"] == swapped


def _decays(name: str) -> bool:
    """Whether a parameter is in the large sub-group; the small one stays in the file."""
    return (
        name.endswith("weight") and "ln" not in name and name not in ("norm.weight", "head.weight")
    )


@pytest.mark.skipif(not (SHARED_CORPUS / "s3nvme").is_dir(), reason="15 MB, not in fixtures/")
def test_swapped_subgroups_of_two_ranks_come_from_nvme(tmp_path: Path) -> None:
    convert(SHARED_CORPUS / "s3nvme", tmp_path / "model")
    truth = torch.load(SHARED_CORPUS / "s3nvme/truth.bin", weights_only=False)
    found = weights_in(tmp_path / "model")
    for name, value in truth.items():
        if value.get("fp32") is not None:
            assert same(found[name], value["fp32"])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_zero_alone_does_not_explain_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / "corpus" / name
    if name == "nl2":
        source /= "n0"
    run("to-fp32", source, "-o", tmp_path / "model", code=1)
    said = capsys.readouterr()
    assert REFUSED[name] in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_universal_checkpoint_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / "corpus" / "s1bf"
    run("to-fp32", source, "--tag", "global_step2_universal", "-o", tmp_path / "m", code=1)
    assert "universal" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
