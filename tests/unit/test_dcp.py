"""Checkpoints of FSDP and torch's DCP, as torch itself writes them, read as it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dcp_checkpoints
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_checkpoints import sharded
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

import ckpt
from ckpt.rewrite import dcp as crossing
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.detect import read
from converters.errors import CheckpointError
from converters.storage import open_files
from converters.tensors import TensorRef

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}
FULL = {
    "embed.weight": torch.arange(77.0).reshape(11, 7),
    "layer.0.weight": torch.randn(6, 4, 3),
    "layer.0.bias": torch.randn(5).bfloat16(),
    "scale": torch.tensor(2.5),
    "one_row": torch.randn(1, 4),
    "none": torch.zeros(0, 4),
    "counter": torch.arange(4),
    "mask": torch.tensor([True, False]),
}
MESHES = {
    "FSDP of 2": ((2,), (Shard(0),)),
    "FSDP of 4": ((4,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "HSDP": ((2, 2), (Replicate(), Shard(0))),
    "FSDP and tensor parallel": ((2, 2), (Shard(0), Shard(1))),
    "FSDP after tensor parallel": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
}


def value(ref: TensorRef) -> torch.Tensor:
    data = bytearray(ref.nbytes)
    open_files.read_extents(memoryview(data), ref.extents)
    dtype = TYPES[ref.dtype.value]
    return (
        torch.frombuffer(data, dtype=dtype).reshape(ref.shape) if data else torch.empty(ref.shape)
    )


def require_equal(source: ShardedCheckpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    refs = source.weights.by_every_name()
    assert set(refs) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(value(refs[name]), tensor), name


def model_on(mesh: str) -> Mapping[str, Any]:
    """The tensors as ranks of a mesh have them; those of too few axes are whole on each."""
    shape, placements = MESHES[mesh]
    axes = max(p.dim for p in placements if isinstance(p, Shard | _StridedShard)) + 1
    return {
        name: sharded(tensor, shape, placements) if tensor.ndim >= axes else tensor
        for name, tensor in FULL.items()
    }


def world_size(mesh: str) -> int:
    return int(torch.Size(MESHES[mesh][0]).numel())


@pytest.mark.parametrize("mesh", MESHES)
def test_tensors_cut_over_a_mesh_are_those_that_torch_loads(mesh: str, tmp_path: Path) -> None:
    folder = dcp_checkpoints.save(
        tmp_path / "step-5", lambda rank: {"model": model_on(mesh), "step": 5}, world_size(mesh)
    )
    source = read(folder, complete=True)
    assert isinstance(source, ShardedCheckpoint)
    assert (source.kind, source.step, source.stage) == ("dcp", 5, None)
    require_equal(source, FULL)

    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in FULL.items()}}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    require_equal(source, loaded["model"])


@pytest.mark.parametrize("options", [{"thread_count": 2}, {"single_file_per_rank": False}])
def test_a_rank_may_write_several_files(options: dict[str, Any], tmp_path: Path) -> None:
    folder = dcp_checkpoints.save(
        tmp_path / "c", lambda rank: {"model": model_on("FSDP of 2")}, **options
    )
    assert len(list(folder.glob("*.distcp"))) > 2
    source = read(folder)
    require_equal(source, FULL)
    assert source.world_size == 2


def test_ranks_that_describe_their_own_pieces_are_joined(tmp_path: Path) -> None:
    """torch's own ``dcp_to_torch_save`` reads the description of one rank."""
    folder = dcp_checkpoints.save_without_collectives(
        tmp_path / "step-5", lambda rank: {"model": model_on("FSDP of 2"), "step": 5}
    )
    source = read(folder, complete=True)
    assert (source.kind, source.world_size) == ("dcp-of-ranks", 2)
    require_equal(source, FULL)

    (folder / "__0.metadata").unlink()
    with pytest.raises(CheckpointError, match=r"has \.metadata of rank 1, and none of rank 0"):
        read(folder)


LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Accelerate": (("model",), ("optimizer",)),
    "torchtitan": ((), ("optimizer",)),
    "Lightning": (("model",), ("optimizer_0",)),
    "Lightning's FSDP2": (("state_dict",), ("optimizer_0",)),
    "composer": (("state", "model"), ("state", "optimizers", "AdamW")),
    "tutorial": (("app", "model"), ("app", "optim")),
}
OPTIMIZER = {
    "state": {
        name: {"exp_avg": tensor.float() + 1, "step": torch.tensor(7.0)}
        for name, tensor in FULL.items()
        if tensor.is_floating_point()
    },
    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(FULL)[:5]}],
}
FLAT_OPTIMIZER = {
    **{
        f"state.{name}.{key}": tensor
        for name, state in OPTIMIZER["state"].items()  # type: ignore[attr-defined]
        for key, tensor in state.items()
    },
    **{f"param_groups.{name}.lr": 0.1 for name in list(FULL)[:3]},
    **{f"param_groups.{name}.lr": 0.2 for name in list(FULL)[3:5]},
}


def nested(keys: tuple[str, ...], content: Mapping[str, Any]) -> dict[str, Any]:
    for key in reversed(keys):
        content = {key: content}
    return dict(content)


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    common = first.keys() & second.keys()
    return {**first, **second, **{key: merged(first[key], second[key]) for key in common}}


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_and_optimizer_are_told_apart_by_their_keys(
    layout: str, is_flat: bool, tmp_path: Path
) -> None:
    model_keys, optimizer_keys = LAYOUTS[layout]
    optimizer = FLAT_OPTIMIZER if is_flat else OPTIMIZER
    state = merged(nested(model_keys, FULL), nested(optimizer_keys, optimizer))
    state["train_state"] = {"step": torch.tensor(9)}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)

    source = read(tmp_path / "c", complete=True)
    assert isinstance(source, ShardedCheckpoint) and source.optimizer and source.groups
    require_equal(source, FULL)
    assert source.step == 9
    assert source.weights.trained == OPTIMIZER["state"].keys()  # type: ignore[attr-defined]
    for name in source.weights.trained:
        states = source.optimizer(name)
        assert states.keys() == {"exp_avg", "step"} and states["step"] == 7
        assert isinstance(states["exp_avg"], TensorRef)
        assert torch.equal(value(states["exp_avg"]), FULL[name].float() + 1)
    with pytest.raises(KeyError):
        source.optimizer("counter")

    groups = [(group.names, group.options["lr"]) for group in source.groups()]
    names = tuple(FULL)[:5]
    assert groups == ([(names[:3], 0.1), (names[3:], 0.2)] if is_flat else [(names, 0.1)])


def test_a_tied_name_is_one_that_the_optimizer_does_not_know(tmp_path: Path) -> None:
    """Norms that are all ones are equal, too, and are not tied."""
    norms = {f"norm.{index}.weight": torch.ones(7) for index in range(3)}
    model = {**norms, "embed.weight": FULL["embed.weight"], "head.weight": FULL["embed.weight"]}
    trained = ["norm.0.weight", "norm.1.weight", "embed.weight"]
    state = {name: {"exp_avg": model[name]} for name in trained}
    dcp.save({"model": model, "optimizer": {"state": state}}, checkpoint_id=tmp_path, no_dist=True)
    source = read(tmp_path)
    assert source.weights.aliases == {"head.weight": "embed.weight"}
    assert source.optimizer and source.optimizer("head.weight") == source.optimizer("embed.weight")


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_optimizer_may_know_wrappers_that_the_model_does_not(
    is_flat: bool, tmp_path: Path
) -> None:
    name = "layer._checkpoint_wrapped_module.w"
    states = {f"_orig_mod.{name}": {"exp_avg": torch.ones(3)}}
    flat_states = {f"state._orig_mod.{name}.exp_avg": torch.ones(3)}
    state = {
        "model": {"layer.w": torch.zeros(3)},
        "optimizer": flat_states if is_flat else {"state": states},
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    source = read(tmp_path)
    assert source.optimizer and source.optimizer("layer.w").keys() == {"exp_avg"}
    assert source.weights.trained == {"layer.w"}


def test_what_is_not_the_models_is_left_out_and_said(tmp_path: Path) -> None:
    state = {"model": FULL, "ema": {"shadow": torch.ones(3)}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    source = read(tmp_path)
    require_equal(source, FULL)
    assert source.notes == (
        "left out 1 tensor that is neither the model's nor the optimizer's: ema.shadow",
    )
    assert source.optimizer is None


def test_an_optimizer_of_numbers_has_no_names(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    source = read(tmp_path, complete=True)
    assert isinstance(source, ShardedCheckpoint) and source.groups is None
    assert source.optimizer is not None
    with pytest.raises(CheckpointError, match="under numbers, not under names"):
        source.optimizer("weight")


def test_chunks_in_safetensors_are_put_together(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    folder = tmp_path / "sharded"
    tensors = {name: FULL[name] for name in ("embed.weight", "layer.0.weight", "one_row")}
    dcp_checkpoints.save(
        folder,
        lambda rank: {name: sharded(tensor) for name, tensor in tensors.items()},
        writer_class=HuggingFaceStorageWriter,
        save_distributed=True,
    )

    source = read(folder)
    assert source.kind == "dcp-safetensors"
    require_equal(source, tensors)
    assert "a missing file of the last rank cannot be told" in source.notes[0]

    next(folder.glob("shard-00001-*")).unlink()
    with pytest.raises(CheckpointError, match="some are missing"):
        read(folder)


def test_layers_that_megatron_stacks_are_tensors_of_their_own(tmp_path: Path) -> None:
    stacked = torch.randn(3, 4, 5)
    state = {
        "decoder.layers.mlp.linear_fc1.weight": stacked,
        "decoder.layers.norm.bias": torch.arange(3.0),
        "decoder.final_layernorm.weight": torch.ones(4),
        "optimizer.state.exp_avg.decoder.layers.norm.bias": torch.ones(3),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    dcp_checkpoints.edit_metadata(tmp_path, lambda m: setattr(m, "planner_data", None))
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 12}, tmp_path / "common.pt")

    source = read(tmp_path)
    assert (source.kind, source.step) == ("megatron-dist", 12)
    layers = {f"decoder.layers.{i}.mlp.linear_fc1.weight": stacked[i] for i in range(3)}
    biases = {f"decoder.layers.{i}.norm.bias": torch.tensor(float(i)) for i in range(3)}
    final = {"decoder.final_layernorm.weight": torch.ones(4)}
    require_equal(source, {**layers, **biases, **final})

    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="format 'zarr' of Megatron-Core"):
        read(tmp_path)


def test_names_without_a_planner_are_split_at_their_first_key(tmp_path: Path) -> None:
    state = {"model": FULL, "optimizer": OPTIMIZER}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    dcp_checkpoints.edit_metadata(tmp_path, lambda m: setattr(m, "planner_data", None))
    source = read(tmp_path, complete=True)
    require_equal(source, FULL)
    assert source.optimizer and source.optimizer("layer.0.bias")["step"] == 7


def test_the_weights_are_opened_and_converted(tmp_path: Path) -> None:
    folder = dcp_checkpoints.save(
        tmp_path / "step-5", lambda rank: {"model": model_on("FSDP and tensor parallel")}, 4
    )
    dcp_to_torch_save(folder, tmp_path / "torch.pt")
    expected = torch.load(tmp_path / "torch.pt")["model"]
    with ckpt.open(folder) as weights:
        for name, tensor in expected.items():
            in_fp32 = tensor.float() if tensor.is_floating_point() else tensor
            assert torch.equal(weights[name], in_fp32)

    for dtype, kind in (("keep", None), ("bf16", torch.bfloat16)):
        model = ckpt.to_fp32(folder, tmp_path / f"out-{dtype}", dtype=dtype)
        with ckpt.open(model) as weights:
            for name, tensor in expected.items():
                is_cast = kind is not None and tensor.is_floating_point()
                assert torch.equal(weights[name], tensor.to(kind) if is_cast else tensor)


def adam(names: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """An optimizer's state by the names of parameters."""
    state = {name: {"exp_avg": tensor + 1} for name, tensor in names.items()}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": [*names]}]}


WEIGHT, OTHER = torch.arange(6.0), torch.arange(6.0) * 2


def saved(state: Mapping[str, Any], folder: Path) -> Path:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize(
    "state",
    [
        {
            "app": {"model": {"w": WEIGHT}, "optim": adam({"w": WEIGHT})},
            "aema": {"model": {"w": OTHER}},
        },
        {
            "ema": {"model": {"w": OTHER}},
            "student": {"model": {"w": WEIGHT}, "optimizer": adam({"w": WEIGHT})},
        },
        {"w": WEIGHT, "ema": {"model": {"w": OTHER}}, "optimizer": adam({"w": WEIGHT})},
        {"app": {"model": {"w": WEIGHT}}, "optimizer": adam({"w": WEIGHT})},
        {"model": {"w": WEIGHT}, "teacher": {"model": {"w": OTHER}}},
    ],
)
def test_a_model_is_the_one_that_its_optimizer_stands_beside(
    state: dict[str, Any], tmp_path: Path
) -> None:
    source = read(saved(state, tmp_path), complete=True)
    assert torch.equal(value(source.weights.tensors["w"]), WEIGHT)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {
                name: {"model": {"w": tensor}, "optimizer": adam({"w": tensor})}
                for name, tensor in (("actor", WEIGHT), ("critic", OTHER))
            },
            "optimizers of several trainings, under actor, critic",
        ),
        (
            {
                "ema": {"model": {"w": OTHER}},
                "trainer": {"net": {"w": WEIGHT}, "optimizer": adam({"w": WEIGHT})},
            },
            r"no model beside it; its model may be ema\.model, trainer\.net",
        ),
        (
            {
                "ema": {"model": {"w": OTHER}},
                "net": {"w": WEIGHT},
                "optimizer": {"state.w.exp_avg": WEIGHT},
            },
            r"its model may be ema\.model, net",
        ),
        (
            {"a": {"model": {"w": WEIGHT}}, "b": {"model": {"w": OTHER}}},
            r"several models, a\.model, b\.model",
        ),
        ({"model": {"w": WEIGHT}, "module": {"w": OTHER}}, "several models, model, module"),
        (
            {"model": {"w": WEIGHT}, "optim": adam({"w": WEIGHT}), "optimizer": adam({"w": OTHER})},
            "states of w in two optimizers, optim and optimizer",
        ),
        (adam({"w": WEIGHT}), "no tensor of a model, but the states of an optimizer"),
        ({"state.w.exp_avg": WEIGHT}, "no tensor of a model, but the states of an optimizer"),
        (
            {"state": {"0": {"exp_avg": WEIGHT}}, "param_groups": [{"params": [0]}]},
            "no tensor of a model, but the states of an optimizer",
        ),
    ],
)
def test_models_that_could_be_meant_are_listed(
    state: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(saved(state, tmp_path))


def test_optimizers_of_one_model_are_read_as_one(tmp_path: Path) -> None:
    state = {
        "model": {"w": WEIGHT, "v": OTHER},
        "optimizer_0": adam({"w": WEIGHT}),
        "optimizer_1": adam({"v": OTHER}),
    }
    source = read(saved(state, tmp_path), complete=True)
    assert isinstance(source, ShardedCheckpoint) and source.groups
    assert [group.names for group in source.groups()] == [("w",), ("v",)]
    assert source.weights.trained == {"w", "v"}
    assert "2 optimizers (optimizer_0, optimizer_1) are read as one" in source.notes[-1]


@pytest.mark.parametrize("layout", ["plain", "torchtitan"])
def test_a_parameter_without_a_state_stays_in_its_group(layout: Any, tmp_path: Path) -> None:
    """One without a gradient so far, or any of SGD without momentum."""
    optimizer = adam({"w": WEIGHT})
    optimizer["param_groups"][0]["params"] = ["w", "v"]
    state = {"model": {"w": WEIGHT, "v": OTHER}, "optimizer": optimizer}
    source = saved(state, tmp_path / "c")
    output = tmp_path / "output"
    crossing.execute(crossing.plan_to(source, output=output, layout=layout))

    result = read(output, complete=True)
    assert isinstance(result, ShardedCheckpoint) and result.groups
    assert [group.names for group in result.groups()] == [("w", "v")]
    assert result.weights.trained == {"w"}
    with pytest.raises(CheckpointError, match="no state of v, of param group 0"):
        crossing.plan_from(source, 1, stage=2)


def test_a_name_in_a_group_may_lack_the_wrappers_of_the_model(tmp_path: Path) -> None:
    state = {"model": {"module.w": WEIGHT}, "optimizer": adam({"w": WEIGHT})}
    source = read(saved(state, tmp_path))
    assert isinstance(source, ShardedCheckpoint) and source.groups
    assert [group.names for group in source.groups()] == [("module.w",)]


def test_names_cross_without_what_data_parallel_puts_before_them(tmp_path: Path) -> None:
    state = {
        "model": {"module.w": WEIGHT, "module.v": OTHER},
        "optimizer": adam({"module.w": WEIGHT}),
    }
    source = saved(state, tmp_path / "c")
    plan = crossing.plan_to(source, output=tmp_path / "output")
    assert any("without module." in note for note in plan.notes)
    crossing.execute(plan)

    result = read(tmp_path / "output", complete=True)
    assert isinstance(result, ShardedCheckpoint) and result.groups
    require_equal(result, {"w": WEIGHT, "v": OTHER})
    assert result.groups()[0].names == ("w",) and result.weights.trained == {"w"}
