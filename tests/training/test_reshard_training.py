"""Stock DeepSpeed and the Hugging Face Trainer go on from resharded checkpoints: real processes."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from oracles import FIXTURES, root_of, same, torchrun
from safetensors.torch import load_file
from test_reshard import held

from ckpt.rewrite import reshard as resharding
from ckpt.rewrite import universal
from converters.errors import CheckpointError
from converters.zero import checkpoint

JOBS = {  # world size: fixtures and the stage they become
    1: [("zero2-bf16-w3", 3), ("zero3-fp16-w2", 2), ("zero1-fp32-w4", 1)],
    2: [
        *(("zero2-aligned", 2), ("zero2-zero-sized", 3), ("zero3-zero-sized", 1)),
        *(("zero3-subgroups", 3), ("zero1-bf16-w3", 2)),
    ],
    3: [
        *(("zero2-round-robin", 3), ("zero2-fp16-w4", 2), ("zero3-bf16-w2", 3)),
        *(("zero2-aligned-round-robin", 1), ("zero3-fp32-w4", 2)),
    ],
    4: [("zero3-bf16-w3", 1), ("zero2-round-robin", 2), ("zero2-fp32-w1", 3)],
}
WORKER = "tests/workers/reshard_worker.py"
REDUCTION_ORDER = 2e-5  # relative, of a loss, after nine steps in fp32


def reshard(source: Path, output: Path, world: int, stage: int, **options: Any) -> Path:
    resharding.execute(resharding.plan(source, world, stage=stage, output=output, **options))
    return output


def ranks(kind: str, jobs: list[dict[str, Any]], world: int, folder: Path) -> None:
    """The worker's jobs, on that many ranks."""
    path = folder / f"{kind}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(jobs))
    torchrun(WORKER, kind, path, ranks=world, limit=600)


def require_same(path: Path, expected: Path) -> None:
    """Requires that two files have the same tensors, bit for bit."""
    found, wanted = load_file(path), load_file(expected)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert same(found[key], value), (path, key)


@pytest.mark.parametrize("world", JOBS)
def test_stock_deepspeed_holds_the_bits_of_the_run_that_saved(world: int, tmp_path: Path) -> None:
    """Weights, moments, 16-bit weights, frozen ones, buffers, steps, rates and loss scale."""
    jobs: list[dict[str, Any]] = []
    for name, stage in JOBS[world]:
        if (
            checkpoint.read(FIXTURES / name).world_size,
            checkpoint.read(FIXTURES / name).stage,
        ) == (
            world,
            stage,
        ):
            raise AssertionError(f"{name} would not be resharded")
        folder = reshard(FIXTURES / name, tmp_path / name, world, stage)
        out = tmp_path / f"{name}.safetensors"
        jobs.append({"folder": str(folder), "spec": name, "stage": stage, "out": str(out)})
    ranks("load", jobs, world, tmp_path)
    for job in jobs:
        require_same(Path(job["out"]), FIXTURES / job["spec"] / "live.safetensors")
        said = json.loads(Path(job["out"]).with_suffix(".json").read_text())
        source = checkpoint.read(FIXTURES / job["spec"])
        root = source.model.root
        assert said["steps"] == [2.0]
        assert said["global_steps"] == root["global_steps"] == 2
        assert said["global_samples"] == root["global_samples"]
        assert said["epoch"] == 1
        assert {group["lr"] for group in said["groups"]} == {0.01}
        scaler = source.ranks[0].optimizer["loss_scaler"].state
        assert said["scaler"]["cur_scale"] == scaler["cur_scale"]
        assert said["scaler"].get("cur_iter") == scaler.get("cur_iter")


def test_what_was_on_nvme_is_loaded_by_an_engine_without(tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / "zero3-nvme.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    source, jobs = tmp_path / "zero3-nvme", list[dict[str, Any]]()
    offload = {"offload_optimizer": {"device": "cpu"}}
    for stage, zero_of in ((3, offload), (2, {})):
        folder = reshard(source, tmp_path / f"{stage}", 1, stage)
        job = {"folder": str(folder), "spec": source.name, "stage": stage, "zero": zero_of}
        job["without_kernel"] = stage == 3  # it takes no step: nothing is compiled
        jobs.append({**job, "out": str(tmp_path / f"{stage}.safetensors")})
    ranks("load", jobs, 1, tmp_path)
    for job in jobs:
        require_same(Path(str(job["out"])), source / "live.safetensors")


def test_training_goes_on_over_three_topologies_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Stage 2 on two ranks, 3 on one, 1 on three, 2 on four; the losses are the unbroken run's."""
    spec = {"spec": "zero2-fp32-w2", "stage": 2}
    whole = {**spec, "out": str(tmp_path / "whole"), "steps": 9}
    ranks("train", [{**whole, "half": str(tmp_path / "0"), "half_steps": 3}], 2, tmp_path)
    losses = json.loads((tmp_path / "0/losses.json").read_text())
    for part, (world, stage) in enumerate([(1, 3), (3, 1), (4, 2)], 1):
        before = tmp_path / f"{part - 1}"
        size = 200 if stage == 3 else None
        start = tmp_path / f"{part}-start"
        folder = reshard(before, start, world, stage, sub_group_size=size)
        out = tmp_path / f"{part}"
        job = {"spec": spec["spec"], "stage": stage, "source": str(folder), "out": str(out)}
        job |= {"zero": {"sub_group_size": size} if size else {}, "steps": 2}
        ranks("train", [job], world, tmp_path)
        require_same(out / "loaded.safetensors", before / "live.safetensors")
        losses += json.loads((out / "losses.json").read_text())
    expected = json.loads((tmp_path / "whole/losses.json").read_text())
    assert losses == pytest.approx(expected, rel=REDUCTION_ORDER)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize(("name", "world"), [("trainer-zero2", 3), ("trainer-zero3", 1)])
def test_the_trainer_resumes_from_it(name: str, world: int, tmp_path: Path) -> None:
    source = root_of(FIXTURES / name)
    stage = checkpoint.read(source).stage
    folder = reshard(source, tmp_path / "checkpoint-2", world, stage)
    out = tmp_path / "out"
    torchrun(WORKER, "trainer", out, name, folder, ranks=world, limit=300)
    require_same(out / "loaded.safetensors", FIXTURES / name / "live.safetensors")
    assert json.loads((out / "state.json").read_text()) == {"global_step": 4, "steps": [4.0]}
    after = checkpoint.read(out / name / "checkpoint-4")
    assert (after.stage, after.world_size, after.step) == (stage, world, 4)


MUON: dict[str, Any] = {"optimizer": {"type": "Muon", "params": {"lr": 0.01}}}
SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_NOISE = 1e-3  # relative, of a loss: gradients of other batch sizes, rounded to bf16


def tensors(folder: Path) -> dict[Any, Any]:
    """Weights and states by name, in whatever order the optimizer has them."""
    return {key: value for key, value in held(folder).items() if isinstance(key, tuple)}


def trained(name: str, folder: Path) -> list[float]:
    losses: list[float] = json.loads((folder / name / "losses.json").read_text())
    return losses


def test_muon_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 and 3, offloaded and not, to other ranks and from 3 to 2: the momentum, too.

    On three ranks a matrix lies on two of them, so both keep its whole momentum.
    """
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # the kernels of Muon are not what is tested
    muon = {"spec": "zero2-fp32-w2", "config": MUON, "bare": True, "steps": 2}
    plain, offload = {"reduce_scatter": False}, {"offload_optimizer": {"device": "cpu"}}

    def job(name: str, stage: int, zero: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {**muon, "stage": stage, "zero": zero, "out": str(tmp_path / name), **more}

    def moved(
        name: str, source: str, world: int, stage: int, zero: dict[str, Any], *, init: bool = True
    ) -> Any:
        more = {"zero_init": init} if stage == 3 and not source.startswith("3") else {}
        folder = reshard(tmp_path / source, tmp_path / f"{name}-start", world, stage, **more)
        again = str(tmp_path / f"{name}-again")
        return job(name, stage, zero, source=str(folder), again=again, init=init)

    whole = {"steps": 6, "half": str(tmp_path / "2"), "half_steps": 2}
    jobs = [job("whole", 2, plain, **whole), job("3", 3, plain), job("off", 2, plain | offload)]
    ranks("train", jobs, 2, tmp_path)
    expected = trained("whole", tmp_path)
    assert len(set(expected)) == 6
    jobs = [moved("2-2", "2", 3, 2, plain), moved("3-1", "3", 3, 1, plain)]
    jobs += [moved("2-3", "2", 3, 3, plain), moved("2-3-seen", "2", 3, 3, plain, init=False)]
    ranks("train", [*jobs, moved("off-1", "off", 3, 1, plain | offload)], 3, tmp_path)
    for name, source in (
        ("2-2", "2"),
        ("3-1", "3"),
        ("2-3", "2"),
        ("2-3-seen", "2"),
        ("off-1", "off"),
    ):
        assert tensors(tmp_path / f"{name}-again") == tensors(tmp_path / source)
        assert trained(name, tmp_path) == pytest.approx(expected[2:4], rel=REDUCTION_ORDER)
    folder = tmp_path / "3-universal"  # in the order of stages 1 and 2, whatever stage saved
    universal.execute(universal.plan_to(tmp_path / "3", output=folder))
    universal.execute(universal.plan_from(folder, 3, stage=1, output=tmp_path / "3-native"))
    assert held(tmp_path / "3-native") == held(tmp_path / "3-1-start")
    with pytest.raises(CheckpointError, match="pass zero_init=True or zero_init=False"):
        universal.plan_from(folder, 1, stage=3)
    planned = universal.plan_from(
        folder, 3, stage=3, zero_init=True, output=tmp_path / "3-native-3"
    )
    universal.execute(planned)
    assert held(tmp_path / "3-native-3") == held(tmp_path / "3")
    split = checkpoint.read(tmp_path / "2-2").ranks
    buffers = [s.optimizer["base_optimizer_state"]["state"][0]["momentum_buffer"] for s in split]
    assert sum(buffer.numel for buffer in buffers) > sum(
        s.optimizer["single_partition_of_fp32_groups"][0].numel for s in split
    )
    jobs = [moved("2-2-2", "2-2", 1, 2, plain), moved("3-3", "3", 1, 3, plain)]
    ranks("train", jobs, 1, tmp_path)
    assert tensors(tmp_path / "2-2-2-again") == tensors(tmp_path / "2-2")
    assert tensors(tmp_path / "3-3-again") == tensors(tmp_path / "3")
    assert trained("2-2-2", tmp_path) == pytest.approx(expected[4:], rel=REDUCTION_ORDER)
    assert trained("3-3", tmp_path) == pytest.approx(expected[2:4], rel=REDUCTION_ORDER)


def test_bf16_optimizer_goes_on_on_other_ranks_and_in_other_stages(tmp_path: Path) -> None:
    """Its files to its own, to those of stages 2 and 3, and back."""
    bf16 = {"spec": "zero2-bf16-w2", "config": SUMS, "bare": True, "steps": 2}

    def moved(name: str, source: str, world: int, stage: int) -> dict[str, Any]:
        folder = reshard(tmp_path / source, tmp_path / f"{name}-start", world, stage)
        places = {"source": str(folder), "again": str(tmp_path / f"{name}-again")}
        return {**bf16, "stage": stage, "out": str(tmp_path / name), **places}

    whole = {**bf16, "stage": 1, "out": str(tmp_path / "whole"), "steps": 4}
    ranks("train", [{**whole, "half": str(tmp_path / "half"), "half_steps": 2}], 2, tmp_path)
    assert checkpoint.read(tmp_path / "half").bf16_optimizer
    jobs = [moved("1-1", "half", 3, 1), moved("1-2", "half", 3, 2), moved("1-3", "half", 3, 3)]
    jobs.append({**jobs[0], "config": {}, "out": str(tmp_path / "native")})
    jobs[-1]["again"] = str(tmp_path / "native-again")  # the same files by another optimizer
    ranks("train", jobs, 3, tmp_path)
    ranks("train", [moved("2-1", "1-2-again", 2, 1)], 2, tmp_path)
    assert checkpoint.read(tmp_path / "2-1-start").bf16_optimizer
    for name in ("1-1", "1-2", "1-3", "native", "2-1"):
        assert held(tmp_path / f"{name}-again") == held(tmp_path / "half"), name
        expected = trained("whole", tmp_path)[2:]
        assert trained(name, tmp_path) == pytest.approx(expected, rel=BF16_NOISE)
    assert trained("2-1", tmp_path) == trained("whole", tmp_path)[2:]
