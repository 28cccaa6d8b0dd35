"""``ckpt to-dcp``: what torch's own dcp.load, FSDP2 and Accelerate make of it is the live engine's.

On two ranks it is in ``tests/training/test_dcp_training.py``.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fixture_specs import SPECS
from fixture_worker import Tiny, param_groups
from oracles import FIXTURES, live, run
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as state_dicts
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.fsdp import fully_shard

from ckpt.rewrite import dcp as crossing
from converters import cast, detect
from converters.dcp.writing import folder, proof
from converters.dcp.writing.items import PlainObject
from converters.errors import CheckpointError

SOURCES = (
    *("zero1-fp32-w2", "zero1-bf16-w3", "zero2-bf16-w3", "zero2-offload", "zero2-aligned"),
    *("zero2-aligned-round-robin", "zero2-exclude-frozen", "zero3-fp16-w4", "zero3-zero-sized"),
    *("zero3-subgroups", "zero3-offload", "zero0-bf16-fused"),
)
TRAINER = FIXTURES / "trainer-zero2/checkpoint-2"


def crossed(source: Path, output: Path, **options: Any) -> Path:
    crossing.execute(crossing.plan_to(source, output=output, **options))
    return output


def leaves(path: Path) -> dict[str, Any]:
    """Everything in a folder of DCP, nested, as torch loads it."""
    nested: dict[str, Any] = {}
    _load_state_dict(
        nested,
        storage_reader=dcp.FileSystemReader(path),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return nested


def metadata(path: Path) -> Metadata:
    return dcp.FileSystemReader(path).read_metadata()


def require_live(source: Path, model: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Fails unless all that the live engine held is there, bit for bit."""
    engine = live(source)
    for name, value in engine["fp32"].items():
        assert torch.equal(model[name], value), name
    for name, value in engine["buffer"].items():
        assert torch.equal(model[name], value), name
    for key in ("exp_avg", "exp_avg_sq"):
        trained = engine[key].keys() - {"head.weight"}  # which is tied to embed.weight
        assert states.keys() == trained
        for name in trained:
            assert torch.equal(states[name][key], engine[key][name]), (key, name)


@pytest.mark.parametrize("name", SOURCES)
def test_torch_loads_every_value_of_the_live_engine(name: str, tmp_path: Path) -> None:
    nested = leaves(crossed(FIXTURES / name, tmp_path / "dcp", files=2))
    states = nested["optimizer"]["state"]
    require_live(FIXTURES / name, nested["model"], states)
    steps = 3 if name == "zero0-bf16-fused" else 2  # as its file has it
    for state in states.values():
        assert (state["step"].dtype, state["step"].shape) == (torch.float32, torch.Size())
        assert state["step"] == steps

    names = [name for group in nested["optimizer"]["param_groups"] for name in group["params"]]
    assert sorted(names) == sorted(states)


def test_a_tied_name_has_the_master_weights_of_its_owner(tmp_path: Path) -> None:
    path = crossed(FIXTURES / "zero2-bf16-w3", tmp_path / "dcp")
    model = leaves(path)["model"]
    assert model["head.weight"].dtype == torch.float32
    assert torch.equal(model["head.weight"], model["embed.weight"])

    # they are stored once
    places = {index.fqn: place for index, place in metadata(path).storage_data.items()}
    assert places["model.head.weight"] == places["model.embed.weight"]


def test_options_are_those_of_the_run_and_what_torch_has_beside(tmp_path: Path) -> None:
    groups = leaves(crossed(FIXTURES / "zero2-offload", tmp_path / "dcp"))["optimizer"][
        "param_groups"
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    weights = [torch.nn.Parameter(torch.zeros(1))]
    for optimizer in (torch.optim.AdamW(weights), torch.optim.Adam(weights)):
        for group in groups:
            assert group.keys() >= optimizer.param_groups[0].keys()
    assert all(group["decoupled_weight_decay"] for group in groups)


@pytest.mark.parametrize("layout", ["plain", "torchtitan"])
def test_a_plain_training_goes_on_from_it(layout: str, tmp_path: Path) -> None:
    source = FIXTURES / "zero3-subgroups"
    path = crossed(source, tmp_path / "dcp", layout=layout)
    model, optimizer = training(source.name)
    load(path, model, optimizer, flat=layout == "torchtitan")
    require_loaded(source, model, optimizer)
    train(model, optimizer)


@pytest.mark.parametrize("layout", ["plain", "accelerate", "torchtitan"])
def test_fsdp_goes_on_from_it(layout: str, tmp_path: Path, process_group: None) -> None:
    source = FIXTURES / "zero2-bf16-w3"
    path = crossed(source, tmp_path / "dcp", layout=layout, files=3)
    model, optimizer = training(source.name, shard=True)
    if layout == "accelerate":
        load_as_accelerate(path, model, optimizer)
    else:
        load(path, model, optimizer, flat=layout == "torchtitan")
    require_loaded(source, model, optimizer)
    train(model, optimizer)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def training(name: str, shard: bool = False) -> tuple[Tiny, torch.optim.Optimizer]:
    """The model of a fixture with other weights, and torch's own optimizer."""
    torch.manual_seed(1)
    model = Tiny(SPECS[name])
    if shard:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    return model, torch.optim.AdamW(param_groups(model, "two"), lr=1.0)


def load(path: Path, model: Tiny, optimizer: torch.optim.Optimizer, flat: bool) -> None:
    """Loads a folder as a script does that calls dcp.load."""
    options = state_dicts.StateDictOptions(flatten_optimizer_state_dict=flat)
    of_model, of_optimizer = state_dicts.get_state_dict(model, optimizer, options=options)
    loaded = {**of_model, "optimizer": of_optimizer}
    if not flat:
        loaded = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=path, no_dist=not dist.is_initialized())
    state_dicts.set_state_dict(
        model,
        optimizer,
        model_state_dict={key: loaded[key] for key in of_model} if flat else loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )


def load_as_accelerate(path: Path, model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    """Loads a folder as the Trainer and Accelerate do, by their own functions."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import fsdp_utils

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = SimpleNamespace(
        wait_for_everyone=lambda: None, num_processes=1, process_index=0, is_fsdp2=True
    )
    PartialState(cpu=True)  # its logger wants one
    try:
        fsdp_utils.load_fsdp_model(plugin, accelerator, model, path)
        fsdp_utils.load_fsdp_optimizer(plugin, accelerator, optimizer, model, path)
    finally:
        PartialState._reset_state()


def require_loaded(source: Path, model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    """Fails unless model and optimizer hold what the live engine did."""

    def whole(value: Any) -> torch.Tensor:
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    tensors = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    states = {
        name: {key: whole(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
    require_live(source, tensors, states)
    assert {float(state["step"]) for state in states.values()} == {2.0}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def train(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    """A further step."""
    model(torch.arange(8).reshape(2, 4)).backward()
    optimizer.step()


def test_the_folder_of_a_trainer_has_what_its_resume_reads(tmp_path: Path) -> None:
    path = crossed(TRAINER, tmp_path / "checkpoint-2", layout="accelerate")
    names = {entry.name for entry in path.iterdir()}
    expected_names = {
        *("pytorch_model_fsdp_0", "optimizer_0", "scheduler.pt", "trainer_state.json"),
        *("rng_state_0.pth", "rng_state_1.pth", "config.json", "rewriting.json"),
    }
    assert names >= expected_names
    assert not names & {"latest", "model.safetensors", "global_step2"}

    made_from = json.loads((path / "rewriting.json").read_text())["source"]
    assert (made_from["form"], made_from["name"], made_from["step"]) == ("dcp", "checkpoint-2", 2)


@pytest.mark.parametrize("layout", ["plain", "accelerate", "torchtitan"])
def test_what_was_written_is_whole(layout: str, tmp_path: Path) -> None:
    run("verify", crossed(TRAINER, tmp_path / "checkpoint-2-dcp", layout=layout), "--data")


def test_a_scheduler_that_only_deepspeed_kept_has_a_file(tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(FIXTURES / "zero2-bf16-w2", source)
    (model_path,) = source.glob("*/mp_rank_00_model_states.pt")
    root = torch.load(model_path, weights_only=False)
    root["lr_scheduler"] = {"base_lrs": [0.5, 0.25], "last_epoch": 2, "_step_count": 3}
    torch.save(root, model_path)

    path = crossed(source, tmp_path / "dcp", layout="accelerate")
    assert torch.load(path / "scheduler.bin") == root["lr_scheduler"]
    groups = leaves(path / "optimizer_0")["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.5, 0.25]


def test_large_tensors_are_cut_for_as_many_ranks_as_files(tmp_path: Path) -> None:
    tensors = {
        "large": torch.randn(100, 300),
        "odd": torch.arange(50_001),
        "row": torch.randn(1, 40_000),
        "small": torch.randn(3, 3).bfloat16(),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(2.5),
    }
    source = tmp_path / "model"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    path = crossed(source, tmp_path / "dcp", files=3)
    model = leaves(path)["model"]
    assert model.keys() == tensors.keys()
    assert all(torch.equal(model[name], value) for name, value in tensors.items())

    entries = metadata(path).state_dict_metadata
    sizes = {name: [tuple(c.sizes) for c in entries[f"model.{name}"].chunks] for name in tensors}
    assert sizes["large"] == [(34, 300), (34, 300), (32, 300)]
    assert [len(sizes[name]) for name in ("odd", "row", "small", "number")] == [3, 1, 1, 1]
    assert sorted(p.name for p in path.glob("*.distcp")) == [f"__{n}_0.distcp" for n in range(3)]


def test_equal_options_and_steps_are_stored_once(tmp_path: Path) -> None:
    path = crossed(FIXTURES / "zero2-bf16-w3", tmp_path / "dcp", layout="torchtitan")
    places = metadata(path).storage_data
    steps = {str(place) for index, place in places.items() if index.fqn.endswith(".step")}
    betas = {str(place) for index, place in places.items() if index.fqn.endswith(".betas")}
    assert (len(steps), len(betas)) == (1, 1)


def test_metadata_is_what_torch_makes_of_the_same(tmp_path: Path) -> None:
    path = crossed(FIXTURES / "zero2-bf16-w3", tmp_path / "dcp", files=1)
    nested = leaves(path)
    dcp.save(nested, checkpoint_id=tmp_path / "stock", no_dist=True)
    ours, stock = metadata(path), metadata(tmp_path / "stock")
    assert ours.planner_data == stock.planner_data
    assert ours.state_dict_metadata == stock.state_dict_metadata
    assert ours.storage_data.keys() == stock.storage_data.keys()
    with open(path / ".metadata", "rb") as file:
        assert type(pickle.load(file)) is Metadata


def test_a_dcp_is_written_in_another_layout_and_the_same_again(tmp_path: Path) -> None:
    first = crossed(FIXTURES / "zero3-fp16-w4", tmp_path / "first", files=2)
    flat = crossed(first, tmp_path / "flat", layout="torchtitan", files=3)
    again = crossed(flat, tmp_path / "again")
    before, after = leaves(first), leaves(again)
    assert before["model"].keys() == after["model"].keys()
    for name, value in before["model"].items():
        assert torch.equal(after["model"][name], value), name
    states = before["optimizer"]["state"]
    for name, state in states.items():
        other_state = after["optimizer"]["state"][name]
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[key], other_state[key]) for key in state), name


def test_a_universal_folder_gives_the_same(tmp_path: Path) -> None:
    source = FIXTURES / "zero2-bf16-w3"
    run("to-universal", source, "-o", tmp_path / "universal")
    nested = leaves(crossed(tmp_path / "universal", tmp_path / "dcp"))
    require_live(source, nested["model"], nested["optimizer"]["state"])


@pytest.mark.parametrize(
    "name",
    [
        *("pipelines-and-experts/autoep-zero3", "pipelines-and-experts/moe-zero1-frozen"),
        *("pipelines-and-experts/pipeline-zero1", "parallel/tp_qwen3_frozen_z2_w4"),
        *("parallel/mics_hier_w4", "parallel/sp2_z1_w4"),
    ],
)
def test_what_more_ranks_have_cut_is_whole(name: str, tmp_path: Path) -> None:
    """Beside the reader of to-fp32 and ckpt.open, which puts shards together by itself."""
    source = detect.read(FIXTURES / name, complete=True)
    nested = leaves(crossed(FIXTURES / name, tmp_path / "dcp", files=2))
    states = nested["optimizer"]["state"]
    assert states
    for parameter, state in states.items():
        weight = source.weights.by_every_name()[parameter]
        assert nested["model"][parameter].numpy().tobytes() == cast.load(weight).tobytes()
        expected = source.optimizer(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].numpy().tobytes() == cast.load(expected[key]).tobytes(), parameter


def test_states_without_names_are_left_out_and_told(tmp_path: Path) -> None:
    plan = crossing.plan_to(FIXTURES / "zero0-fp32", output=tmp_path / "dcp")
    assert any("the optimizer's states are not written" in note for note in plan.notes)
    crossing.execute(plan)
    assert leaves(tmp_path / "dcp").keys() == {"model"}


def test_what_two_names_would_share_is_refused(tmp_path: Path) -> None:
    names = ("layer.weight", "_orig_mod.layer.weight")
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two tensors would be called layer\.weight"):
        crossing.plan_to(tmp_path / "model.safetensors", output=tmp_path / "dcp")


@pytest.mark.parametrize("arguments", [{"files": 0}, {"files": True}, {"layout": "fsdp"}])
def test_arguments_that_mean_nothing_are_refused(arguments: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        crossing.plan_to(TRAINER, output=tmp_path / "dcp", **arguments)


def test_the_proof_sees_a_tensor_in_the_place_of_another(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    crossing.execute(plan)
    entries = list(plan.proof.folders[""])
    first, second, *_ = (
        index for index, entry in enumerate(entries) if entry.path[-1] == "exp_avg_sq"
    )
    entries[first] = entries[first]._replace(value=entries[second].value)
    require_unproven(plan, entries, tmp_path)


def test_the_proof_sees_another_option(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    crossing.execute(plan)
    entries = [
        entry._replace(value=PlainObject(0.02)) if entry.path[-1] == "lr" else entry
        for entry in plan.proof.folders[""]
    ]
    require_unproven(plan, entries, tmp_path)
    require_unproven(plan, entries[:-1], tmp_path)


def planned(tmp_path: Path) -> Any:
    return crossing.plan_to(FIXTURES / "zero2-bf16-w2", output=tmp_path / "dcp")


def require_unproven(plan: Any, entries: list[folder.StateEntry], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this is a fault of ckpt"):
        proof.verify({"": entries}, plan.plan, tmp_path / "dcp")


def test_after_an_interruption_the_same_command_goes_on(tmp_path: Path) -> None:
    source = FIXTURES / "zero2-bf16-w2"
    whole = crossed(source, tmp_path / "whole", files=2)
    plan = crossing.plan_to(source, output=tmp_path / "dcp", files=2)
    calls: list[int] = []

    def interrupt(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crossing.execute(plan, progress=interrupt)
    assert not (tmp_path / "dcp").exists()
    assert not any(tmp_path.glob(".dcp.partial/.metadata"))

    crossing.execute(plan)
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in (tmp_path / "dcp").iterdir()}
    for name in names:
        assert (tmp_path / "dcp" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_types_without_a_class_of_storages_are_written_as_torch_writes_them(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = torch.arange(12, dtype=torch.float32).to(dtype).reshape(3, 4)
    dcp.save({"model": {"w": tensor}}, checkpoint_id=tmp_path / "source", no_dist=True)
    loaded = {"model": {"w": torch.zeros_like(tensor)}}
    path = crossed(tmp_path / "source", tmp_path / "dcp", files=2)
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert torch.equal(loaded["model"]["w"].view(torch.uint8), tensor.view(torch.uint8))


def test_what_a_training_saved_is_not_replaced(tmp_path: Path) -> None:
    shutil.copytree(TRAINER, tmp_path / "run/checkpoint-2")
    run("to-dcp", TRAINER, "-o", tmp_path / "run/checkpoint-2", "--overwrite", code=1)
    run("to-dcp", TRAINER, "-o", tmp_path / "dcp")
    run("to-dcp", TRAINER, "-o", tmp_path / "dcp", code=1)
    run("to-dcp", TRAINER, "-o", tmp_path / "dcp", "--overwrite", "--files", 1)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 1


def test_damage_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(FIXTURES / "zero2-bf16-w2", source)
    path = sorted(source.glob("*/*zero_pp_rank_1*"))[0]
    data = bytearray(path.read_bytes())
    tensors = torch.load(path, weights_only=False)["optimizer_state_dict"]
    needle = tensors["single_partition_of_fp32_groups"][0].detach().numpy().tobytes()
    data[data.index(needle) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC32"):
        crossed(source, tmp_path / "dcp")
    assert not any(tmp_path.glob("*dcp*"))
