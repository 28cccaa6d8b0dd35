"""Checkpoints cut up for other ranks and stages: nothing lost, nothing moved, nothing changed.

What stock DeepSpeed makes of them is in ``test_reshard_training.py``.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FIXTURES, corpus, made, root_of, run, same

from ckpt.folders import filenames
from ckpt.rewrite import reshard as resharding
from ckpt.runs import manifest
from ckpt.runs.manifest import Manifest
from converters import cast
from converters.errors import CheckpointError
from converters.execute import shards as stream
from converters.pickles.interpreter import Interpreter
from converters.pickles.values import Call, Global
from converters.plan import Plan
from converters.tensors import DType, Extent, TensorRef
from converters.torch_files import file_plan, object_graph, pickle_writer, reader
from converters.zero import checkpoint as zero
from converters.zero import muon, optimizer_state, param_groups, partitioning
from converters.zero.native import reshard
from converters.zero.param_groups import WEIGHTS

REFUSED = {
    "o0_3_16_s2": "DeepSpeed before 0.4.2",
    "o0_5_10_s2": "needs 0.6.0 or later",
}
STAGES = {  # where stage 3 is refused
    "s1el": "elastic_checkpoint, which keeps no param",
    "zero1-elastic": "elastic_checkpoint, which keeps no param",
    "s2muon": "Muon orders parameters by shape",
}
PARTLESS = [
    ("zero0-bf16", "without ZeRO"),
    ("pipelines-and-experts/moe-zero0-bf16", "of experts without ZeRO"),
]
WHOLE = [
    *(p for p in [*made(), *corpus()] if not p.name.startswith(("zero0", "s0"))),
    FIXTURES / "trainer-zero2",
    FIXTURES / "trainer-zero3",
]
SOURCE = FIXTURES / "zero2-bf16-w3"


def go(source: Path, output: Path, world: int, stage: int | None = None, **options: Any) -> Path:
    """The resharded checkpoint, or the source where it is so cut already."""
    found = zero.read(source)
    if (found.world_size, found.stage) != (world, stage or found.stage):
        planned = resharding.plan(source, world, stage=stage, output=output, **options)
        resharding.execute(planned)
        return output
    return source


def held(source: Path) -> dict[Any, Any]:
    """Everything of a checkpoint that must survive, read by what knows nothing of resharding."""
    checkpoint = zero.read(source)
    found: dict[Any, Any] = {"aliases": dict(checkpoint.weights.aliases)}
    for index, group in enumerate(
        param_groups.read(checkpoint, object_graph.read(checkpoint.ranks[0].path).root)
    ):
        found[index] = (list(group.shapes), group.options, group.keys)
        for key, values in group.values.items():
            found |= {(index, key, name): content(ref) for name, ref in values.items()}
    for name, ref in checkpoint.weights.tensors.items():
        kind = name in checkpoint.weights.buffers, name in checkpoint.weights.frozen
        found["weight", name] = (*content(ref), *kind)
    return found


def content(ref: TensorRef) -> tuple[DType, tuple[int, ...], bytes]:
    return ref.dtype, ref.shape, cast.load(ref).tobytes()


MUONS = [(1, 1), (2, 5), (1, 9), (3, 3)]
EVERY = [(stage, world) for stage in (1, 2, 3) for world in (1, 2, 5)]
BACK = {  # stages and world sizes to try, there and back
    "s2muon": MUONS,
    "b16opt": MUONS,
    "zero1-bf16-w3": EVERY,
    "zero2-fp16-w2": EVERY,
    "zero3-fp32-w4": EVERY,
}


@pytest.mark.parametrize("source", WHOLE, ids=lambda path: path.name)
def test_resharding_there_and_back_gives_the_same_bits(source: Path, tmp_path: Path) -> None:
    """Of most only there: back they go from what ``test_universal.py`` makes of universal folders,
    which those with elastic_checkpoint have not."""
    root, number = root_of(source), WHOLE.index(source)
    if source.name in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[source.name]):
            resharding.plan(root, 5, output=tmp_path / "x")
        return
    before, expected = zero.read(root), held(root)
    is_elastic = before.ranks[0].setting("zero_optimization", "elastic_checkpoint")
    for stage, world in BACK.get(source.name, [(1 + number % 3, 1 + number % 5)]):
        if stage == 3 and source.name in STAGES:
            with pytest.raises(CheckpointError, match=STAGES[source.name]):
                resharding.plan(root, world, stage=3, output=tmp_path / "x")
            continue
        there = go(root, tmp_path / f"z{stage}-w{world}", world, stage)
        assert held(there) == expected, (stage, world)
        if source.name in BACK or is_elastic:
            first = (before.world_size, before.stage or 1)
            back = go(there, tmp_path / f"z{stage}-w{world}-back", *first)
            assert held(back) == expected, (stage, world)


@pytest.mark.parametrize(
    "name",
    [
        *("zero1-fp32-w2", "zero1-zero-sized", "zero2-bf16-w2", "zero2-aligned", "zero3-fp16-w3"),
        *("zero2-exclude-frozen", "zero2-zero-sized", "zero2-offload", "zero3-subgroups"),
        *("zero3-zero-sized", "zero3-exclude-frozen", "corpus/s2muon", "corpus/b16opt"),
    ],
)
def test_the_files_are_as_deepspeed_itself_cuts_them(name: str, tmp_path: Path) -> None:
    """Back at the first topology every object is the one that DeepSpeed wrote."""
    source = FIXTURES / name
    before = zero.read(source)
    stage = 1 if before.stage == 3 or source.name == "s2muon" else 3
    there = go(source, tmp_path / "there", 4, stage)
    back = go(there, tmp_path / "back", before.world_size, before.stage)
    for path in sorted((source / "global_step2").iterdir()):
        one = torch.load(path, weights_only=False)
        other = torch.load(back / "global_step2" / path.name, weights_only=False)
        for root in (one, other):
            root.get("optimizer_state_dict", {}).pop("clip_grad", None)  # stage 3 has none
        assert list(one) == list(other)
        alike(one, other, f"{source.name}/{path.name}")


def alike(one: Any, other: Any, where: str) -> None:
    """Requires the same classes, keys and values; padding may hold anything."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            alike(one[key], other[key], f"{where}.{key}")
        assert getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            alike(left, right, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), where
        assert one.requires_grad == other.requires_grad, where
        padded = ("fp32_flat", "fragments", "exp_avg", "b16opt.*single_partition")
        flat = any(re.search(word, where) for word in padded)
        assert flat or same(one.detach(), other.detach()), where
        assert flat or one.storage_offset() == other.storage_offset(), where
    elif hasattr(one, "__dict__") and not hasattr(one, "value"):
        alike(vars(one), vars(other), where)
    else:
        assert one == other, where


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_element_lands_exactly_once_and_comes_back(data: st.DataObject) -> None:
    """Any shapes, groups, worlds and settings, without a file: places alone."""
    shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=8)
    named = {f"p{i}": shape for i, shape in enumerate(data.draw(shapes))}
    at, refs = 0, {}
    for name, shape in named.items():
        numel = TensorRef(DType.F32, shape, zero_extents(shape)).numel
        refs[name] = TensorRef(DType.F32, shape, (Extent(Path("source"), at, 4 * numel),))
        at += 4 * numel
    world = data.draw(st.integers(1, 7))
    order = list(named)
    if data.draw(st.booleans()):
        order = partitioning.round_robin_order(order, world)
        assert partitioning.undo_round_robin(order, world) == list(named)
    numels = [refs[name].numel for name in order]
    aligned = data.draw(st.booleans())
    itemsize = data.draw(st.sampled_from([2, 4]))
    paddings = partitioning.padding_for(numels, itemsize) if aligned else [0] * len(order)

    runs = partitioning.partition_group([refs[name] for name in order], world, paddings)
    lean = partitioning.unpadded_sizes(sum(numels) + sum(paddings), world)
    assert {len({run.numel for run in runs}), runs[0].numel % 2} <= {0, 1}
    ranks = [run.narrow(0, count) for run, count in zip(runs, lean, strict=True)]
    ordered = {name: named[name] for name in order}
    back = dict(partitioning.stage12(ranks, ordered, paddings))
    assert partitioning.unused_elements(ranks, ordered, paddings) == 0
    require_same(back, refs)
    once(runs, at)

    flats: list[TensorRef] = []
    size = data.draw(st.integers(1, 60))
    cut = partitioning.sub_groups(named, world, size)
    assert [name for names in cut for name in names] == list(named)
    for names in cut:
        vectors = [
            TensorRef.concat(
                partitioning.partition_parameter(refs[name], rank, world) for name in names
            )
            for rank in range(world)
        ]
        assert {vector.numel for vector in vectors} == {partitioning.subgroup_size(names, world)}
        require_same(
            dict(partitioning.stage3(vectors, names)), {name: refs[name] for name in names}
        )
        flats += vectors
    once(flats, at)


def zero_extents(shape: tuple[int, ...]) -> tuple[Extent, ...]:
    numel = 1
    for count in shape:
        numel *= count
    return (Extent(Path("none"), 0, 4 * numel),)


def require_same(found: dict[str, TensorRef], expected: dict[str, TensorRef]) -> None:
    assert found.keys() == expected.keys()
    for name, ref in expected.items():
        assert found[name].shape == ref.shape
        assert TensorRef.concat([found[name]]).extents == TensorRef.concat([ref]).extents


def once(parts: list[TensorRef], size: int) -> None:
    """Requires that the parts hold every byte of the source, and none twice."""
    runs = sorted(
        (extent.offset, extent.end)
        for part in parts
        for extent in part.extents
        if extent.path == Path("source") and extent.length
    )
    end = 0
    for start, stop in runs:
        assert start == end
        end = stop
    assert end == size


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint, each rank's optimizer state changed by ``change(state, rank)``."""
    shutil.copytree(source, target)
    for rank, path in enumerate(sorted(target.glob("global_step2/*optim_states.pt"))):
        root = torch.load(path, weights_only=False)
        inner = root["optimizer_state_dict"]
        kept = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
        for state in kept["state"].values():
            change(state, rank)
        torch.save(root, path)
    return target


def lion(state: dict[str, Any], _: int) -> None:
    """The state of another optimizer in the place of Adam's."""
    moment = state.pop("exp_avg")
    state.clear()
    state |= {"lion_m": moment.bfloat16(), "count": torch.tensor([7]), "none": None, "k": 3}


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-subgroups"])
def test_state_of_any_optimizer_is_kept_under_its_own_names(name: str, tmp_path: Path) -> None:
    source = rewritten(FIXTURES / name, tmp_path / "s", lion)
    expected = held(source)
    assert {key[1] for key in expected if isinstance(key, tuple) and len(key) == 3} == {
        WEIGHTS,
        "lion_m",
    }
    for stage in (1, 3):
        there = go(source, tmp_path / f"z{stage}", 2, stage)
        assert held(there) == expected
        path = next(iter(sorted(there.glob("global_step2/*optim_states.pt"))))
        inner = torch.load(path, weights_only=False)["optimizer_state_dict"]
        kept = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
        counts = [state["count"] for state in kept["state"].values()]
        assert all(count.tolist() == [7] for count in counts)
        assert len({count.data_ptr() for count in counts}) == len(counts)
        assert {(state["none"], state["k"]) for state in kept["state"].values()} == {(None, 3)}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_muons_momentum_is_whole_on_every_rank_and_each_element_its_owners(
    data: st.DataObject,
) -> None:
    """Any matrices, worlds and paddings, without a file: places alone."""
    shape = st.tuples(st.integers(1, 5), st.integers(1, 5))
    named = {f"p{i}": s for i, s in enumerate(data.draw(st.lists(shape, min_size=1, max_size=8)))}
    refs, at = {}, 0
    for name, (rows, columns) in named.items():
        extent = Extent(Path("source"), at, 4 * rows * columns)
        refs[name] = TensorRef(DType.F32, (rows, columns), (extent,))
        at += extent.length
    numels = [ref.numel for ref in refs.values()]
    world = data.draw(st.integers(1, 9))
    paddings = (
        partitioning.padding_for(numels, 4) if data.draw(st.booleans()) else [0] * len(numels)
    )
    total = sum(numels) + sum(paddings)
    run, lean = partitioning.rank_size(total, world), partitioning.unpadded_sizes(total, world)
    own = []
    for rank, buffer in enumerate(muon.rank_buffers(refs, world, run, paddings)):
        parts = muon.overlaps(named, rank * run, run, paddings)
        inside = [name for name, *_ in parts]
        assert buffer.numel == sum(refs[name].numel for name in inside)
        split = [name for name, _, count, _ in parts if count < refs[name].numel]
        require_same(dict(muon.copies(buffer, named, parts)), {n: vector(refs[n]) for n in split})
        own.append(muon.own_elements(buffer, named, parts, lean[rank]))
    require_same(dict(partitioning.stage12(own, named, paddings)), refs)
    once(own, at)


def vector(ref: TensorRef) -> TensorRef:
    return ref.view(ref.numel)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m, rank: m + rank, r"momentum_buffer of emb.weight is not that of the other"),
        (lambda m, rank: m[rank:], "has 144 elements, the parameters that this rank has parts of"),
    ],
)
def test_a_momentum_that_is_not_muons_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    def changed(state: dict[str, Any], rank: int) -> None:
        if "momentum_buffer" in state:
            state["momentum_buffer"] = change(state["momentum_buffer"], rank)

    source = rewritten(FIXTURES / "corpus/s2muon", tmp_path / "s", changed)
    with pytest.raises(CheckpointError, match=why):
        resharding.plan(source, 3, output=tmp_path / "o")


def test_muon_to_stage_3_is_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    """That of the module, or by shape; either way back gives the same bits."""
    source = FIXTURES / "corpus/s2muon"
    orders = []
    for init in (True, False):
        there = go(source, tmp_path / f"{init}", 3, 3, zero_init=init)
        checkpoint = zero.read(there)
        tree = object_graph.read(checkpoint.ranks[0].path).root
        (group,) = (g for g in param_groups.read(checkpoint, tree) if muon.is_muon_group(g.options))
        orders.append(list(group.shapes))
        assert held(go(there, tmp_path / f"{init}-back", 2, 2)) == held(source)
    module = [name for name in zero.read(source).weights.tensors if name in orders[0]]
    assert orders[0] == module and orders[1] == muon.ordered(group.shapes) != module


def test_of_a_muon_that_is_not_deepspeeds_nothing_is_taken_for_granted(tmp_path: Path) -> None:
    """Neither whose elements its momentum has, nor that it sorts its parameters."""
    source = tmp_path / "s"
    shutil.copytree(FIXTURES / "corpus/s2muon", source)
    for path in source.glob("global_step2/*.pt"):
        root = torch.load(path, weights_only=False)
        del root["ds_config"]["optimizer"]
        torch.save(root, path)
    with pytest.raises(CheckpointError, match="momentum_buffer of group 0 has 145 elements"):
        resharding.plan(source, 3, output=tmp_path / "o")


def test_muons_momentum_has_the_name_of_its_parameter(tmp_path: Path) -> None:
    """As ckpt.open gives it, whatever ranks it is cut up for."""
    source = FIXTURES / "corpus/s2muon"
    expected = held(source)
    names = [key[2] for key in expected if isinstance(key, tuple) and key[1] == "momentum_buffer"]
    assert len(names) == 5
    for folder in (source, go(source, tmp_path / "o", 5), go(source, tmp_path / "1", 1)):
        checkpoint = zero.read(folder)
        for name in names:
            found = optimizer_state.read(checkpoint, name)["momentum_buffer"]
            assert isinstance(found, TensorRef)
            assert content(found) == expected[0, "momentum_buffer", name]


def test_bf16_optimizer_becomes_what_the_engine_of_each_stage_has(tmp_path: Path) -> None:
    source = FIXTURES / "corpus/b16opt"
    for stage, world in ((1, 3), (2, 3), (3, 1)):
        folder = go(source, tmp_path / f"{stage}", world, stage)
        state = zero.read(folder).ranks[0].optimizer
        assert ("loss_scaler" in state) == ("zero_stage" in state) == (stage > 1)
    again = go(tmp_path / "3", tmp_path / "again", 2, 1)  # the configuration still says BF16
    assert zero.read(again).bf16_optimizer and held(again) == held(source)
    older = FIXTURES / "corpus/o0_16_9_s0bf"  # stage 0, which has another optimizer since 0.18
    folder = go(older, tmp_path / "older", 2, 1)
    assert zero.read(folder).stage == 1 and held(folder) == held(older)


@pytest.fixture
def on_nvme(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, whose larger sub-group was on NVMe."""
    with tarfile.open(FIXTURES / "zero3-nvme.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "zero3-nvme"


def test_states_that_were_on_nvme_are_in_the_files_afterwards(
    on_nvme: Path, tmp_path: Path
) -> None:
    expected = held(on_nvme)
    kinds = [key[1] for key in expected if isinstance(key, tuple)]
    assert kinds.count("exp_avg") > 5
    planned = resharding.plan(on_nvme, 3, stage=2, output=tmp_path / "there")
    assert any("whose optimizer is not on NVMe" in note for note in planned.notes)
    checks = resharding.execute(planned).checks
    swapped = (on_nvme / "global_step2/offloaded_tensors").rglob("*.swp")
    assert checks and 0 < checks.no_crc32_bytes <= sum(path.stat().st_size for path in swapped)
    assert held(tmp_path / "there") == expected
    back = go(tmp_path / "there", tmp_path / "back", 2, 3)
    assert held(back) == expected
    assert not list(back.rglob("*.swp"))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("exp_avg-0_11.tensor.swp", Path.unlink, "exp_avg-0_11.tensor.swp is missing"),
        ("exp_avg_sq-0_11.tensor.swp", lambda p: os.truncate(p, 4096), "has 4096 bytes, expected"),
    ],
)
def test_a_state_that_was_on_nvme_and_is_lost_is_refused(
    name: str, change: Any, why: str, on_nvme: Path, tmp_path: Path
) -> None:
    change(on_nvme / "global_step2/offloaded_tensors/rank01" / name)
    with pytest.raises(CheckpointError, match=why):
        resharding.plan(on_nvme, 3, output=tmp_path / "o")


def test_an_optimizer_without_state_has_none_afterwards(tmp_path: Path) -> None:
    source = rewritten(SOURCE, tmp_path / "s", lambda state, _: state.clear())
    there = go(source, tmp_path / "o", 4, 3)
    assert held(there) == held(source)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state, rank: state.update(step=torch.tensor(3.0 + rank)), "of another save"),
        (lambda state, rank: state.update(k=rank), "unlike k of group 0"),
        (lambda state, rank: state.update({f"k{rank}": 1}), "unlike optimizer state of group 0"),
        (lambda state, _: state.update(row=torch.ones(5)), "row of group 0 has 5 elements"),
        (lambda state, rank: state.update(m=None if rank else torch.ones(116)), "m of group 0 has"),
    ],
)
def test_state_that_cannot_be_cut_up_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    source = rewritten(SOURCE, tmp_path / "s", change)
    with pytest.raises(CheckpointError, match=why):
        resharding.plan(source, 2, output=tmp_path / "o")


def test_an_optimizer_file_that_contradicts_itself_is_one_line(tmp_path: Path) -> None:
    source = rewritten(SOURCE, tmp_path / "s", lambda state, _: None)
    for path in source.glob("global_step2/*optim_states.pt"):
        root = torch.load(path, weights_only=False)
        root["optimizer_state_dict"]["base_optimizer_state"]["param_groups"].pop()
        torch.save(root, path)
    with pytest.raises(CheckpointError, match="has the state of 1 groups, expected 2"):
        resharding.plan(source, 2, output=tmp_path / "o")


def test_a_missing_rank_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "s"
    shutil.copytree(SOURCE, source)
    (source / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    run("reshard", source, "--world-size", 2, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("name", "why"),
    [*PARTLESS, ("pipelines-and-experts/moe-zero1-tensor", "2 expert ranks among 3 ranks")],
)
def test_what_has_no_plain_partitions_is_refused_by_name(
    name: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=why):
        resharding.plan(FIXTURES / name, 3, output=tmp_path / "o")


def test_the_same_topology_is_refused_as_nothing_to_do(capsys: Any, tmp_path: Path) -> None:
    run("reshard", SOURCE, "--world-size", 3, "-o", tmp_path / "o", code=1)
    assert "is of stage 2 for 3 ranks already" in capsys.readouterr().err
    run("reshard", SOURCE, code=1)
    assert "name another --world-size or --stage" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="name another world_size= or stage="):
        resharding.plan(SOURCE)


def test_another_stage_alone_keeps_the_ranks() -> None:
    target = resharding.plan(SOURCE, stage=3).target
    assert target is not None and (target.stage, target.world_size) == (3, 3)


def spoil(path: Path) -> None:
    """Flips a bit in the largest record of a torch file."""
    held = reader.read(path).checksums
    place = max(held, key=lambda checksum: checksum.extent.length).extent
    with open(path, "r+b") as file:
        file.seek(place.offset + 5)
        byte = file.read(1)
        file.seek(place.offset + 5)
        file.write(bytes([byte[0] ^ 1]))


def test_damaged_bytes_stop_it_and_leave_nothing(tmp_path: Path) -> None:
    source = tmp_path / "s"
    shutil.copytree(SOURCE, source)
    spoil(zero.read(source).ranks[1].path)
    with pytest.raises(CheckpointError, match="is damaged"):
        resharding.execute(resharding.plan(source, 2, output=tmp_path / "o"))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_wrong_plan_is_found_by_reading_the_result(tmp_path: Path) -> None:
    """The proof is no echo: with two parameters exchanged in the plan, it names one of them."""
    checkpoint = zero.read(SOURCE)
    wanted = reshard.target(checkpoint, None, 2)
    plan = reshard.plan(checkpoint, wanted)
    shards = list(plan.shards)
    one, other = (next(p for p in s.placements if p.nbytes > 400) for s in shards[:2])
    swapped = [
        type(s)(
            s.filename,
            s.nbytes,
            s.literals,
            tuple(
                type(p)(p.name, other.source, p.dtype, p.offset) if p is one else p
                for p in s.placements
            ),
            s.crc_slots,
        )
        for s in shards
    ]
    assert one.source.numel == other.source.numel
    made_of = Plan(tuple(swapped), None, 0, {}, plan.checksums)
    (tmp_path / "global_step2").mkdir()
    stream.execute(made_of, tmp_path)
    with pytest.raises(CheckpointError, match=r"the exp_avg of \S+ is not that of the source"):
        reshard.prove(checkpoint, wanted, made_of, tmp_path)


def test_what_belongs_to_ranks_goes_round_and_the_rest_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", source)
    (source / "extra_state_0.state").write_bytes(b"zero")
    (source / "extra_state_1.state").write_bytes(b"one")
    (source / "notes.txt").write_text("mine")
    files = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    planned = resharding.plan(source, 3)
    resharding.execute(planned)
    result = tmp_path / "checkpoint-2-w3"
    written = {p.name: p.read_bytes() for p in result.iterdir() if p.is_file()}
    assert "not copied: notes.txt" in planned.notes
    files.pop("notes.txt")
    files["extra_state_2.state"] = b"zero"
    files["rng_state_2.pth"] = files["rng_state_0.pth"]
    source_record = json.loads(written.pop("rewriting.json"))["source"]
    assert source_record["name"] == "checkpoint-2" and source_record["world_size"] == 2
    assert written == files
    one = go(result, tmp_path / "one", 1)
    names = {p.name for p in one.glob("rng_state*")} | {p.name for p in one.glob("extra*")}
    assert names == {"rng_state.pth", "extra_state_0.state"}


def test_the_result_of_a_committed_checkpoint_is_committed(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", source)
    names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
    files = {name: manifest.digest(source / name) for name in names}
    sealed = Manifest(2, "global_step2", "full", "ab" * 16, 1.0, 2, 2, files=files)
    (source / filenames.MANIFEST).write_bytes(sealed.dumps())
    result = go(source, tmp_path / "checkpoint-2-w3", 3)
    found = manifest.read(result)
    assert (found.step, found.stage, found.world_size, found.tag) == (2, 2, 3, "global_step2")
    assert found.save != sealed.save
    assert not manifest.check(result, found, data=True)
    there = {p.relative_to(result).as_posix() for p in result.rglob("*") if p.is_file()}
    assert there == {*found.files, filenames.MANIFEST}
    run("verify", result, "--data", code=0)


def test_a_run_folder_stands_for_its_latest_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "trainer-zero3/checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "latest").write_text("checkpoint-2/global_step2")
    run("reshard", tmp_path, "--world-size", 1, "--stage", 2, code=0)
    result = zero.read(tmp_path / "checkpoint-2-z2-w1")
    assert (result.stage, result.world_size) == (2, 1)
    assert (tmp_path / "checkpoint-2-z2-w1/latest").read_text() == "global_step2"


@pytest.mark.parametrize("path", ["global_step2", ".", "../global_step2"])
def test_a_tag_folder_may_be_named_from_anywhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURES / "zero3-bf16-w3", tmp_path / "s")
    inside = path != "global_step2"
    monkeypatch.chdir(tmp_path / "s" / ("global_step2" if inside else ""))
    run("reshard", path, "--world-size", 2, code=0)
    assert held(tmp_path / "s-w2") == held(FIXTURES / "zero3-bf16-w3")


def test_an_interrupted_run_goes_on_with_the_files_that_are_whole(
    tmp_path: Path,
) -> None:
    planned = resharding.plan(SOURCE, 2, output=tmp_path / "o")
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resharding.execute(planned, workers=1, progress=stop)
    first = tmp_path / ".o.partial" / planned.plan.shards[0].filename
    before = first.stat().st_ino
    assert not (tmp_path / "o").exists()
    resharding.execute(planned)
    assert (tmp_path / "o" / planned.plan.shards[0].filename).stat().st_ino == before
    assert held(tmp_path / "o") == held(SOURCE)


def test_a_dry_run_writes_nothing_and_names_every_file(tmp_path: Path, capsys: Any) -> None:
    args = ("reshard", SOURCE, "--world-size", 4, "-o", tmp_path / "o")
    run(*args, "--dry-run", "--json", code=0)
    facts = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    run(*args, "--json", "--read-back", code=0)
    done = json.loads(capsys.readouterr().out)
    sizes = {f["name"]: os.stat(tmp_path / "o" / f["name"]).st_size for f in facts["files"]}
    assert sizes == {f["name"]: f["bytes"] for f in done["files"]}
    assert done["checks"]["parameter_tensors"] == 15
    assert done["checks"]["optimizer_tensors"] == 30
    assert done["checks"]["read_back_bytes"] > done["checks"]["crc32_bytes"] * 0.9


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 4)):
        planned = resharding.plan(SOURCE, 2, stage=3, output=tmp_path / name)
        resharding.execute(planned, workers=workers)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            other = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == other.read_bytes()


class Mine:
    def __init__(self, held: Any) -> None:
        self.held = held


def test_any_object_of_a_client_state_is_written_again_as_it_was(tmp_path: Path) -> None:
    shared = [1, 2]
    state = {
        "plain": [None, True, False, 0, -1, 2**31, -(2**31), 2**70, -(2**63), 0.1, float("inf")],
        "text": ["", "é", "\ud800", "x" * 300],
        "bytes": [b"", b"\x00\xff" * 200],
        "tuples": ((), (1,), ((2,), "x")),
        "sets": [set(), {1, "a"}, frozenset({2})],
        "shared": [shared, shared],
        "mine": Mine({"deep": [torch.arange(3)]}),
        "ordered": OrderedDict(b=1, a=2),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "types": [torch.ones(2, dtype=d) for d in (torch.int8, torch.bool, torch.float8_e4m3fn)],
        "views": [(t := torch.arange(6.0).view(2, 3)), t.t(), t[1]],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
    }
    state["self"] = state["shared"]
    torch.save(state, tmp_path / "s.pt")
    shard = file_plan.shard("t.pt", object_graph.read(tmp_path / "s.pt").root)
    stream.execute(Plan((shard,), None, 0), tmp_path)
    found = torch.load(tmp_path / "t.pt", weights_only=False, mmap=True)
    assert found["self"] is found["shared"]
    assert found["shared"][0] is found["shared"][1]
    assert found["views"][0].data_ptr() == found["views"][1].data_ptr()
    assert vars(found["mine"])["held"]["deep"][0].tolist() == [0, 1, 2]
    assert type(found["parameter"]) is torch.nn.Parameter
    for key in state.keys() - {"mine", "self"}:
        if any(isinstance(v, torch.Tensor) for v in torch.utils._pytree.tree_leaves(state[key])):
            alike(state[key], found[key], key)
        else:
            assert found[key] == state[key]
            assert type(found[key]) is type(state[key])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_plain_values_are_pickled_as_pickle_itself_reads_them(value: Any) -> None:
    data, storages = pickle_writer.dumps(value)
    assert not storages
    assert pickle.loads(data) == value
    assert Interpreter(data, {}, lambda pid: pid, "x").run() == value


def test_calls_keep_how_they_were_made() -> None:
    record = Call(Global("m", "C"), (1,), {"a": 2}, [3], [("k", 4)], new=True)
    again = Interpreter(pickle_writer.dumps(record)[0], {}, lambda pid: pid, "x").run()
    for field in ("of", "args", "state", "items", "pairs", "new"):
        assert getattr(again, field) == getattr(record, field)
    assert WEIGHTS not in ("exp_avg", "step")
