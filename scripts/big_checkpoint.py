"""Makes a ZeRO checkpoint of a Llama of any size, as DeepSpeed 0.19.8 and the HF Trainer leave one.

    FOLDER/config.json  latest
    FOLDER/global_step2/bf16_zero_pp_rank_R_mp_rank_00_optim_states.pt     12 bytes a parameter
                        mp_rank_00_model_states.pt                         stage 2: bf16 weights
                        zero_pp_rank_R_mp_rank_00_model_states.pt          stage 3: placeholders

Every key, class and storage is where DeepSpeed puts it, as in the real files of shared/corpus. The
values are random but belong together: the bf16 weights are the fp32 masters rounded and the moments
follow from the masters, so an output can be checked as well as timed. One rank is made at a time.

With --sparse the tensors' bytes are holes: a terabyte takes seconds to make, and no room.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import click
import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from llama_shapes import EMBEDDING, HEAD, Shapes, Tree, count, llama, llama_config

TAG = "global_step2"
SUB_GROUP = 1_000_000_000  # zero_optimization.sub_group_size: elements of one rank
SCALING: Tree = {"loss_scaler": LossScaler(1.0), "dynamic_loss_scale": False, "overflow": False}


class Run(NamedTuple):
    """Consecutive elements of one parameter, and where they lie in a rank's flat vector."""

    name: str
    start: int
    numel: int
    at: int


def decay_groups(shapes: Shapes) -> list[Shapes]:
    """The Trainer's two parameter groups: matrices, with weight decay; vectors, without."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    return [matrices, {name: shapes[name] for name in shapes if name not in matrices}]


def sub_groups(group: Shapes, world: int) -> Iterator[Shapes]:
    """Stage 3's cut of a group: consecutive parameters until a rank's part reaches SUB_GROUP."""
    taken, numel = {}, 0
    for name, shape in group.items():
        taken[name] = shape
        numel += -(-prod(shape) // world)
        if numel >= SUB_GROUP:
            yield taken
            taken, numel = {}, 0
    if taken:
        yield taken


def partition(group: Shapes, world: int) -> int:
    """Elements of a group to each rank in stage 2: the flat vector is padded to 2 x world."""
    return -(-count(group) // (2 * world)) * 2


def stage2_runs(group: Shapes, rank: int, world: int) -> Iterator[Run]:
    """What a rank owns where the flat vector of a group is cut into equal parts."""
    at, size = 0, partition(group, world)
    begin, end = rank * size, (rank + 1) * size
    for name, shape in group.items():
        start, stop = max(at, begin), min(at + prod(shape), end)
        if start < stop:
            yield Run(name, start - at, stop - start, start - begin)
        at += prod(shape)


def stage3_runs(group: Shapes, rank: int, world: int) -> Iterator[Run]:
    """What a rank owns where each parameter is cut into equal parts, the last ones padded."""
    at = 0
    for name, shape in group.items():
        part = -(-prod(shape) // world)
        start, stop = rank * part, min((rank + 1) * part, prod(shape))
        if start < stop:
            yield Run(name, start, stop - start, at)
        at += part


def values(name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter's fp32 values, flat: the same for the same name, whoever asks."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    return torch.randn(prod(shape), generator=generator) * 0.02


def flat_states(group: Shapes, runs: Iterable[Run], numel: int) -> list[torch.Tensor]:
    """A rank's fp32 weights, exp_avg and exp_avg_sq for one group; padding is zeros."""
    flat = torch.zeros(numel)
    for name, start, length, at in runs:
        flat[at : at + length] = values(name, group[name])[start : start + length]
    return [flat, flat * 0.01, flat * flat * 0.01]


def adam(groups: list[list[list[torch.Tensor]]]) -> Tree:
    """What torch's AdamW saves for these [weights, exp_avg, exp_avg_sq] of each of its groups."""
    optimizer = torch.optim.AdamW(
        {"params": [weights for weights, _, _ in group], "weight_decay": decay}
        for group, decay in zip(groups, (0.1, 0.0), strict=True)
    )
    for weights, mean, square in chain(*groups):
        moments = {"exp_avg": mean, "exp_avg_sq": square}
        optimizer.state[weights] = {"step": torch.tensor(2.0)} | moments
    return optimizer.state_dict()


def stage2_optimizer(shapes: Shapes, rank: int, world: int) -> Tree:
    """A rank's DeepSpeedZeroOptimizer.state_dict()."""
    groups = decay_groups(shapes)
    sizes = [partition(group, world) for group in groups]
    runs = [list(stage2_runs(group, rank, world)) for group in groups]
    lengths = [sum(run.numel for run in each) for each in runs]  # without the padding
    states = [flat_states(*each) for each in zip(groups, runs, sizes, strict=True)]
    masters = [state[0][:length] for state, length in zip(states, lengths, strict=True)]
    return {
        **SCALING,
        "clip_grad": 1.0,
        "base_optimizer_state": adam([[state] for state in states]),
        "single_partition_of_fp32_groups": [master.requires_grad_() for master in masters],
        "zero_stage": ZeroStageEnum.gradients,
        "group_paddings": [size - length for size, length in zip(sizes, lengths, strict=True)],
        "param_alignment_paddings": [[0] * len(group) for group in groups],
        "partition_count": [world] * len(groups),
        "ds_version": deepspeed.__version__,
        "param_slice_mappings": [
            OrderedDict((run.name, fragment_address(run.numel, run.at)) for run in each)
            for each in runs
        ],
    }


def stage3_optimizer(shapes: Shapes, rank: int, world: int, sparse: bool) -> Tree:
    """A rank's DeepSpeedZeroOptimizer_Stage3.state_dict()."""
    ids = {name: str(at) for at, name in enumerate(shapes)}

    def state(group: Shapes) -> list[torch.Tensor]:
        numel = sum(-(-prod(shape) // world) for shape in group.values())
        if sparse:
            made = [torch.empty(numel) for _ in range(3)]  # never touched, so never in memory
        else:
            made = flat_states(group, stage3_runs(group, rank, world), numel)
        names = list(group)
        made[0].ds_id = f"{ids[names[0]]}_{ids[names[-1]]}"  # type: ignore[attr-defined]
        made[0].requires_grad_()
        return made

    groups = [[*map(state, sub_groups(group, world))] for group in decay_groups(shapes)]
    return {
        "zero_stage": ZeroStageEnum.weights,
        **SCALING,
        "partition_count": world,
        "optimizer_state_dict": adam(groups),
        "fp32_flat_groups": [weights for weights, _, _ in chain(*groups)],
    }


def stage2_module(shapes: Shapes, world: int) -> OrderedDict[str, torch.Tensor]:
    """The bf16 weights: views into one storage for each group, padded as the masters are."""
    views = {}
    for group in decay_groups(shapes):
        flat = torch.zeros(partition(group, world) * world, dtype=torch.bfloat16)
        at = 0
        for name, shape in group.items():
            views[name] = flat[at : at + prod(shape)].view(shape)
            views[name].copy_(values(name, shape).view(shape))
            at += prod(shape)
    return OrderedDict((name, views[name]) for name in shapes)


def model_states(stage: int, shapes: Shapes, rank: int, world: int, tied: bool) -> Tree:
    """What DeepSpeedEngine puts in a rank's model file."""
    groups = decay_groups(shapes)
    if stage == 2:
        module = stage2_module(shapes, world)
    else:
        module = OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in shapes)
        groups = [sub for group in groups for sub in sub_groups(group, world)]
    if tied:
        module[HEAD] = module[EMBEDDING].detach()
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict(group) for group in groups],
        "frozen_param_shapes": OrderedDict(),
        "shared_params": {HEAD: EMBEDDING} if tied and rank == 0 else {},
        "frozen_param_fragments": OrderedDict(),
        **dict.fromkeys(("lr_scheduler", "data_sampler", "random_ltd")),
        "skipped_steps": 0,
        "global_steps": 2,
        "global_samples": 4 * world,
        "dp_world_size": world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
    }


def save(root: Tree, path: Path, stage: int, sparse: bool) -> None:
    """torch.save, or its headers with holes for the data; a hole's CRC is 0, "not computed"."""
    zero = {"stage": stage, "sub_group_size": SUB_GROUP}
    root["ds_config"] = {"zero_optimization": zero, "bf16": {"enabled": True}}
    root["ds_version"] = deepspeed.__version__
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(not sparse)
    try:
        with torch.serialization.skip_data() if sparse else nullcontext():
            torch.save(root, path)
    finally:
        torch.serialization.set_crc32_options(before)


def write(
    folder: Path, shapes: Shapes, stage: int, world: int, tied: bool = False, sparse: bool = False
) -> None:
    """The tag folder with all states of all ranks, and ``latest``; makes the folder."""
    (folder / TAG).mkdir(parents=True)
    for rank in range(world):
        zero = f"zero_pp_rank_{rank}_mp_rank_00"
        if stage == 2:
            optimizer = stage2_optimizer(shapes, rank, world)
        else:
            optimizer = stage3_optimizer(shapes, rank, world, sparse)
        path = folder / TAG / f"bf16_{zero}_optim_states.pt"
        save({"optimizer_state_dict": optimizer}, path, stage, sparse)
        del optimizer  # before the next rank's is made
        if stage == 3 or rank == 0:
            path = folder / TAG / f"{zero if stage == 3 else 'mp_rank_00'}_model_states.pt"
            save(model_states(stage, shapes, rank, world, tied), path, stage, sparse)
    (folder / "latest").write_text(TAG)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--stage", type=click.IntRange(2, 3), default=2, show_default=True)
@click.option("--world-size", "world", default=2, show_default=True)
@click.option("--gb", default=1.4, show_default=True, help="GB of fp32 weights, near enough.")
@click.option("--tied", is_flag=True, help="Let lm_head share the embedding.")
@click.option("--sparse", is_flag=True, help="Holes for the tensors' bytes; stage 3 only.")
def main(folder: Path, stage: int, world: int, gb: float, tied: bool, sparse: bool) -> None:
    """Make a checkpoint in FOLDER, which must not exist yet; print its number of weights."""
    if sparse and stage == 2:
        raise click.UsageError("--sparse needs --stage 3")
    config = llama_config(round(gb * 1e9 / 4), tied)
    shapes = llama(config)
    write(folder, shapes, stage, world, tied, sparse)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    click.echo(count(shapes))


if __name__ == "__main__":
    main()
