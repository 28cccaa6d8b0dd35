"""Checkpoints of torch's DCP as several ranks write them, made in one process.

The planner, the writer and DTensor are torch's own. Only the collectives between the ranks are
played: a fake process group has the rank and the world size, and the plans are passed on here.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

State = Mapping[str, Any]
StateOf = Callable[[int], State]  # of a rank, while the process group has it


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """The process group of a rank that talks to nobody."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(
    full: torch.Tensor,
    mesh_shape: Sequence[int] = (2,),
    placements: Sequence[Placement] = (Shard(0),),
) -> DTensor:
    """A rank's piece of a tensor, cut as torch cuts it; within ``as_rank``."""
    mesh = init_device_mesh("cpu", tuple(mesh_shape))
    whole: DTensor = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=list(placements))


def save(
    folder: Path,
    state_of: StateOf,
    world_size: int = 2,
    writer_class: Callable[..., Any] = FileSystemWriter,
    **writer_options: Any,
) -> Path:
    """``dcp.save`` of all ranks into a folder."""
    planners, writers, plans = [], [], []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            planner, writer = DefaultSavePlanner(), writer_class(str(folder), **writer_options)
            planner.set_up_planner(dict(state_of(rank)), writer.storage_meta(), rank == 0)
            writer.set_up_storage_writer(rank == 0)
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        planners.append(planner)
        writers.append(writer)

    global_plans, metadata = planners[0].create_global_plan(plans)
    global_plans = writers[0].prepare_global_plan(global_plans)
    results = []
    for planner, writer, plan in zip(planners, writers, global_plans, strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
    writers[0].finish(metadata, results)
    return folder


def save_without_collectives(folder: Path, state_of: StateOf, world_size: int = 2) -> Path:
    """``dcp.save(..., use_collectives=False)`` of all ranks into a folder."""
    import torch.distributed.checkpoint as dcp

    for rank in range(world_size):
        with as_rank(rank, world_size):
            dcp.save(dict(state_of(rank)), checkpoint_id=folder, use_collectives=False)
    return folder


def edit_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Changes the ``.metadata`` of a folder, as torch's own objects."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, protocol=4))
