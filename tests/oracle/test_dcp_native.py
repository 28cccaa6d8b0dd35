"""``ckpt from-dcp``: DeepSpeed's native files of what FSDP or dcp.save wrote.

Stock DeepSpeed loads them in ``tests/training/test_dcp_training.py``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_specs import SPECS
from fixture_worker import Tiny, param_groups
from oracles import FIXTURES, run
from test_reshard import held
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as state_dicts

from ckpt.rewrite import dcp as crossing
from converters.errors import CheckpointError
from converters.zero import checkpoint as zero

ROUND_TRIPS = (  # fixture, layout, stage, ranks
    ("zero1-bf16-w3", "plain", 1, 3),
    ("zero2-bf16-w3", "accelerate", 3, 2),
    ("zero2-offload", "torchtitan", 2, 4),
    ("zero2-aligned-round-robin", "plain", 2, 2),
    ("zero3-fp32-w2", "accelerate", 2, 3),
    ("zero3-fp16-w4", "torchtitan", 3, 1),
    ("zero3-subgroups", "plain", 1, 5),
    ("zero3-zero-sized", "plain", 3, 3),
    ("zero2-zero-sized", "torchtitan", 2, 2),
)


def to_dcp(source: Path, output: Path, **options: Any) -> Path:
    crossing.execute(crossing.plan_to(source, output=output, **options))
    return output


def from_dcp(source: Path, output: Path, world: int = 2, stage: int = 2, **options: Any) -> Path:
    crossing.execute(crossing.plan_from(source, world, stage=stage, output=output, **options))
    return output


def trained(source: Path) -> Path:
    """A training of one process that dcp.save saved, with frozen parameters and buffers."""
    torch.manual_seed(3)
    model = Tiny(SPECS["zero2-bf16-w3"])
    optimizer = torch.optim.AdamW(param_groups(model, "two"), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(8).reshape(2, 4)).backward()
        optimizer.step()
    of_model, of_optimizer = state_dicts.get_state_dict(model, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer}
    dcp.save(states, checkpoint_id=source, no_dist=True)
    return source


@pytest.mark.parametrize(("name", "layout", "stage", "world"), ROUND_TRIPS)
def test_from_zero_to_dcp_and_back_every_tensor_and_state_is_the_same(
    name: str, layout: Any, stage: int, world: int, tmp_path: Path
) -> None:
    source = FIXTURES / name
    path = to_dcp(source, tmp_path / "dcp", layout=layout, files=2)
    native = from_dcp(path, tmp_path / "native", world, stage)
    before, after = held(source), held(native)
    assert (zero.read(native).stage, zero.read(native).world_size) == (stage, world)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if not isinstance(key, int):
            assert after[key] == value, key
            continue
        # a param group: its order, options and the names of its states
        names, options, states = value
        assert (after[key][0], sorted(after[key][2])) == (names, sorted(states))
        assert after[key][1].items() >= options.items()


def test_what_dcp_saved_is_what_zero_has(tmp_path: Path) -> None:
    source = trained(tmp_path / "step-2")
    plan = crossing.plan_from(source, 3, stage=3, output=tmp_path / "z", buffer=["scale"])
    crossing.execute(plan)
    checkpoint = zero.read(tmp_path / "z")
    assert checkpoint.weights.buffers == {"scale", "positions", "mask"}
    assert checkpoint.weights.frozen == {"frozen.weight", "frozen.bias"}
    assert checkpoint.weights.aliases == {"head.weight": "embed.weight"}
    assert (checkpoint.step, checkpoint.precision) == (2, "bf16")
    assert any("frozen.weight" in note and "--buffer" not in note for note in plan.notes)


def test_a_16_bit_checkpoint_gets_master_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = torch.nn.Linear(5, 3).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5).bfloat16()).sum().backward()
    optimizer.step()
    of_model, of_optimizer = state_dicts.get_state_dict(model, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer}
    dcp.save(states, checkpoint_id=tmp_path / "dcp", no_dist=True)

    native = from_dcp(tmp_path / "dcp", tmp_path / "native")
    files = sorted(native.glob("*/*optim_states.pt"))
    roots = [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in files]
    masters = torch.cat([root["single_partition_of_fp32_groups"][0] for root in roots])
    assert masters.dtype == torch.float32
    expected = torch.cat([p.detach().flatten() for p in model.parameters()]).float()
    assert torch.equal(masters[: expected.numel()], expected)
    moments = roots[0]["base_optimizer_state"]["state"][0]["exp_avg"]
    assert moments.dtype == torch.float32


def test_steps_that_differ_within_a_group_are_refused(tmp_path: Path) -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(2))
    optimizer = torch.optim.AdamW(layers.parameters())
    for inputs in (layers[:1], layers):
        optimizer.zero_grad()
        sum(layer(torch.ones(1, 2)).sum() for layer in inputs).backward()
        optimizer.step()
    of_model, of_optimizer = state_dicts.get_state_dict(layers, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer}
    dcp.save(states, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match=r"step of 1\.weight is not that of 0\.weight"):
        crossing.plan_from(tmp_path / "dcp", 2, stage=2, output=tmp_path / "z")


def test_what_has_no_optimizer_is_refused(tmp_path: Path) -> None:
    dcp.save({"model": {"a": torch.ones(2)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match="no states of an optimizer"):
        crossing.plan_from(tmp_path / "dcp", 2, stage=2)


def test_what_is_no_dcp_is_refused_with_what_handles_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ckpt reshard takes one of DeepSpeed"):
        crossing.plan_from(FIXTURES / "zero2-bf16-w2", 2, stage=2, output=tmp_path / "z")


@pytest.mark.parametrize("name", ["embed.weight", "nobody"])
def test_a_buffer_is_what_no_optimizer_trains(name: str, tmp_path: Path) -> None:
    source = to_dcp(FIXTURES / "zero2-bf16-w2", tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="buffer="):
        crossing.plan_from(source, 2, stage=2, output=tmp_path / "z", buffer=[name])


def test_the_folder_of_a_trainer_crosses_with_its_files(tmp_path: Path) -> None:
    source = to_dcp(
        FIXTURES / "trainer-zero2/checkpoint-2", tmp_path / "checkpoint-2", layout="accelerate"
    )
    run("from-dcp", source, "--world-size", 4, "--stage", 3, "-o", tmp_path / "z/checkpoint-2")
    names = {path.name for path in (tmp_path / "z/checkpoint-2").iterdir()}
    ranks = {f"rng_state_{rank}.pth" for rank in range(4)}
    assert names >= {"latest", "global_step2", "trainer_state.json", "scheduler.pt", *ranks}
    assert not names & {"pytorch_model_fsdp_0", "optimizer_0"}


def test_damage_in_a_state_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "damaged"
    shutil.copytree(to_dcp(FIXTURES / "zero2-bf16-w2", tmp_path / "dcp", files=1), source)
    path = source / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    states = torch.load(
        next((FIXTURES / "zero2-bf16-w2").glob("*/*rank_0*optim_states.pt")), weights_only=False
    )["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]
    needle = states[:20].numpy().tobytes()
    data[data.index(needle) + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC32"):
        from_dcp(source, tmp_path / "native")
    assert not any(tmp_path.glob("*native*"))
