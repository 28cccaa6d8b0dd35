"""One rank of trainings that are saved and resumed: ``resume_worker.py OUT_DIR PART``."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from live_worker import SMALL, caught, start
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import OFFLOAD, Spec
from fixture_worker import Tiny

import ckpt
from ckpt import live
from ckpt.distributed.load_slots import LoadSlot
from ckpt.engine import mapped_loading
from ckpt.runs.run import open_checkpoint
from converters.torch_files import reader

RATES = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.02, "warmup_num_steps": 4}
WARM = {"scheduler": {"type": "WarmupLR", "params": RATES}}
GROWS = {**WARM, "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}}
CASES = {
    "zero0": Spec(0, config=WARM),
    "zero0-fp32": Spec(0, "fp32", config=WARM),
    "zero1": Spec(1, config=WARM),
    "zero2": Spec(2, "fp32", config=GROWS),
    "zero2-offload": Spec(2, zero=OFFLOAD, config=WARM),
    "zero3": Spec(3, zero=SMALL, config=WARM, zero_sized=True),
    "zero3-fp16": Spec(3, "fp32", zero={"sub_group_size": 20, **SMALL}, config=GROWS),
}
HALF = 3  # steps: in the middle of the warm-up, of a window of the loss scale, of an epoch
REST = 2  # steps after it: the warm-up ends, and a window of the loss scale
OLD = {"checkpoint": {"checkpoint_serialization": False}}  # torch's stream, which no one can map
LARGE = Spec(2, zero=OFFLOAD, vocab=1_000_000)


class Sampler:
    """Something of the user's that has a place to go on from."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def begin(name: str | Spec) -> Any:
    """An engine whose model draws random numbers."""
    engine = start(CASES[name] if isinstance(name, str) else name)
    for block in engine.module.blocks:
        block.register_forward_hook(lambda _, __, out: nn.functional.dropout(out, 0.3))
    return engine


def train(engine: Any, steps: int, sampler: Sampler) -> list[float]:
    """The losses of some steps, which depend on random numbers and on where the sampler is."""
    losses = []
    for _ in range(steps):
        sampler.at += 1
        loss = engine((torch.randint(13, (2, 6)) + sampler.at) % 13)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def tell(out: Path, name: str, what: Any) -> None:
    (out / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(what))


def told(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}-{dist.get_rank()}.json").read_text())


def finals(engine: Any) -> dict[str, torch.Tensor]:
    found = live.fp32_state_dict(engine, None)
    assert found is not None
    return {name: value.clone() for name, value in found.items()}


def parts(engine: Any) -> dict[str, torch.Tensor]:
    """What this rank has of the masters of stage 1 and 2, which nobody has to gather."""
    flat = getattr(engine.optimizer, "single_partition_of_fp32_groups", ())
    return {f"part {number}": part.detach().clone() for number, part in enumerate(flat)}


def first(out: Path) -> None:
    """All steps, and in the middle a save in the foreground and one in the background.

    That a save changes nothing of what follows is for ``saver_worker.cases``.
    """
    for name in CASES:
        engine, sampler = begin(name), Sampler()
        train(engine, HALF, sampler)
        client = {"n": torch.arange(3), "epoch": 2}
        for kind in ("fore", "back"):
            with ckpt.Saver(engine, out / name / kind, background=kind == "back") as saver:
                saver.save(HALF, {"eval_loss": 1.5}, client, {"sampler": sampler})

        tell(out, name, train(engine, REST, sampler))
        torch.save(finals(engine), out / f"{name}-{dist.get_rank()}.pt")
        engine.destroy()


def second(out: Path) -> None:
    """In a new process: the rest of the steps, from either save.

    The second time the engine is one that has trained on: what comes back must not depend on what
    was done before. The files of both saves are the same, so each would do in a new one.
    """
    for name in CASES:
        require_same_files(out / name)
        expected = torch.load(out / f"{name}-{dist.get_rank()}.pt", weights_only=True)
        engine = begin(name)
        for kind in ("fore", "back"):
            sampler, client = Sampler(), dict[str, Any]()
            run = out / name / kind
            engine.global_steps = 0
            at = ckpt.resume(engine, run, extra={"sampler": sampler}, client_state=client)
            gc.collect()
            assert str(run) not in Path("/proc/self/maps").read_text(), "it is still mapped"
            assert at == engine.global_steps == sampler.at == HALF, (at, sampler.at)
            assert set(client) == {"n", "epoch"} and client["n"].tolist() == [0, 1, 2], client
            losses = train(engine, REST, sampler)
            assert losses == told(out, name), (name, kind, losses)
            for key, value in finals(engine).items():
                assert torch.equal(value, expected[key]), (name, kind, key)
        engine.destroy()


def require_same_files(run: Path) -> None:
    """Fails unless the save in the foreground and the one in the background have equal files.

    But for the order of the metadata of safetensors, which it draws by lot.
    """
    fore, back = (run / kind / f"checkpoint-{HALF}" for kind in ("fore", "back"))
    names = [open_checkpoint(folder).manifest.files.keys() for folder in (fore, back)]
    assert names[0] == names[1], (run, names)
    for name in names[0]:
        one, other = fore / name, back / name
        if one.read_bytes() == other.read_bytes():
            continue
        assert name.endswith(".state"), one
        with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
            assert first.metadata() == second.metadata(), one
        assert one.stat().st_size == other.stat().st_size
        assert all(map(torch.equal, load_file(one).values(), load_file(other).values())), one


def run_of(out: Path, name: str, spec: str, stock: bool = False) -> dict[int, Any]:
    """A run with a checkpoint at each of three steps; returns the masters at each.

    With ``stock``, DeepSpeed saves beside it.
    """
    engine, sampler, masters = begin(spec), Sampler(), {}
    with ckpt.Saver(engine, out / name) as saver:
        for step in (1, 2, 3):
            train(engine, 1, sampler)
            masters[step] = finals(engine) | parts(engine)
            saver.save(step, extra={"sampler": sampler})
            if stock:
                engine.save_checkpoint(str(out / f"{name}-stock"), tag=f"t{step}")
    engine.destroy()
    return masters


def weights(out: Path) -> None:
    """The weights of the tag that was asked for, from its fp32 masters, and nothing else."""
    for name in ("zero0", "zero1", "zero2", "zero3", "zero0-fp32"):
        masters = run_of(out, name, name, stock=name == "zero3")
        for stock in {name == "zero3", False}:
            engine = begin(name)
            path, tag = (f"{name}-stock", "t2") if stock else (name, "global_step2")
            more = {"load_foreign": True, "on_mismatch": "warn"} if stock else {}
            # The weights alone first: they leave the counters as they are.
            for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
                sampler, alone = Sampler(), "load_module_only" in options
                extra = None if stock else {"sampler": sampler}
                steps = engine.global_steps
                at = ckpt.resume(engine, out / path, tag=tag, extra=extra, **options, **more)
                assert at == (0 if alone else 2), at
                assert engine.global_steps == (steps if alone else 2)
                assert sampler.at == (0 if stock else at)
                for key, value in finals(engine).items():
                    same = torch.equal(value, masters[2][key])
                    assert same, (name, options, stock, key, value, masters[2][key])
                train(engine, 1, Sampler())
            engine.destroy()


def wrong(out: Path) -> None:
    """What is amiss is told on both ranks, and never becomes a fresh start."""
    rank, name = dist.get_rank(), "zero2-offload"
    masters = run_of(out, "run", name)
    engine = begin(name)
    said: dict[str, Any] = {}

    def prepared(what: str, change: Any) -> Path:
        """A copy of the run that something is done to."""
        if not rank:
            shutil.copytree(out / "run", out / what)
            change(out / what)
        dist.barrier()
        return out / what

    def fails(what: str, path: Path, **options: Any) -> None:
        options.setdefault("extra", {"sampler": Sampler()})
        said[what] = caught(lambda: ckpt.resume(engine, path, timeout=20, **options))
        dist.barrier()

    def works(path: Path, step: int, **options: Any) -> None:
        options.setdefault("extra", {"sampler": Sampler()})
        assert ckpt.resume(engine, path, timeout=20, **options) == step
        for key, value in (parts(engine) or finals(engine)).items():
            assert torch.equal(value, masters[step][key]), key

    def cut(file: Path) -> None:
        os.truncate(file, file.stat().st_size - 1)

    def spoil(file: Path) -> None:
        held = max((each.extent for each in reader.read(file).checksums), key=lambda e: e.length)
        data = bytearray(file.read_bytes())
        data[held.offset + held.length // 2] ^= 1
        file.write_bytes(data)

    optim = "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert ckpt.resume(engine, out / "none") == 0 and ckpt.find(out / "none") is None
    torn = prepared("torn", lambda run: cut(run / "checkpoint-3" / optim))
    works(torn, 2)
    found = ckpt.find(torn)
    assert found == str(torn / "checkpoint-2"), found
    works(torn, 1, tag="global_step1")
    works(out / "run", 3, tag="latest")
    fails("torn", torn / "checkpoint-3")
    fails("torn-tag", torn, tag="global_step3")
    fails("tag", torn, tag="global_step7")
    fails("absent", torn / "checkpoint-7")
    spoilt = prepared("spoilt", lambda run: spoil(run / "checkpoint-3" / optim))
    works(spoilt, 2, verify="data")
    fails("spoilt", spoilt, tag="3", verify="data")

    def drop(name: str) -> Any:
        return lambda run: [(folder / name).unlink() for folder in run.glob("checkpoint-*")]

    gone = prepared("gone", drop("rng_state_1.state"))
    fails("gone", gone)
    bare = prepared("bare", drop("manifest.json"))
    works(bare, 3)  # whole, whoever wrote it
    works(bare / "checkpoint-2", 2)
    works(bare / "checkpoint-2", 2, load_foreign=True)

    engine.save_checkpoint(str(out / "plain" / "epoch1"))  # knows no random states and no sampler
    works(out / "plain", 2)
    assert open_checkpoint(out / "plain" / "epoch1").committed  # by the resume, without progress
    works(out / "plain", 2)

    def leave_weights(run: Path) -> None:
        """Checkpoints of the tier "weights", as of a run that was stopped before a full one."""
        for folder in run.glob("c*"):
            held = json.loads((folder / "manifest.json").read_text())
            del held["digest"]
            held |= {"tier": "weights", "tag": None, "files": {}}
            (folder / "manifest.json").write_text(json.dumps(held))

    light = prepared("light", leave_weights)
    assert ckpt.resume(engine, light, timeout=20) == 0 and ckpt.find(light, timeout=20) is None
    assert ckpt.resume(engine, out / "run" / "new", timeout=20) == 0  # beside committed ones

    def forget(run: Path) -> None:
        """A save that never knew of rank 1's random states."""
        for folder in run.glob("c*"):
            (folder / "rng_state_1.state").unlink()
            held = json.loads((folder / "manifest.json").read_text())
            del held["files"]["rng_state_1.state"], held["digest"]
            (folder / "manifest.json").write_text(json.dumps(held))

    unknown = prepared("unknown", forget)
    fails("unknown", unknown)
    works(unknown, 3, on_mismatch="warn")
    fails("extra", out / "run", extra={"sampler": Sampler(), "other": Sampler()})
    fails("extra-less", out / "run", extra=None)
    fails("asks", out / "run", tag=str(1 + rank))
    fails("option", out / "run", on_mismatch="shrug")

    def change(run: Path) -> None:
        path = run / "checkpoint-3" / "manifest.json"
        held = json.loads(path.read_text())
        held["progress"]["lr"][0] *= 2
        del held["digest"]
        path.write_text(json.dumps(held))

    rate = prepared("rate", change)
    fails("rate", rate)
    works(rate, 3, on_mismatch="warn")
    engine.destroy()
    engine = begin(Spec(2, zero=OFFLOAD, config={**WARM, "gradient_clipping": 0.5}))
    fails("config", out / "run")
    engine.destroy()
    engine = begin(Spec(2, zero={**OFFLOAD, "round_robin_gradients": True}, config=WARM))
    fails("order", out / "run")
    engine.destroy()
    engine = begin(Spec(2, zero=OFFLOAD, config=WARM, vocab=20))
    fails("parameters", out / "run")
    uncommitted = prepared("uncommitted", drop("manifest.json"))
    fails("uncommitted", uncommitted)  # which leaves nothing behind
    assert not any(uncommitted.glob("*/manifest.json"))
    engine.destroy()
    engine = begin("zero3")
    fails("stage", out / "run")
    engine.destroy()
    engine = begin(Spec(3, zero={**OFFLOAD, **SMALL}, config=WARM))
    for _ in range(2):  # the second time it is there
        works(out / "run", 3, reshard="auto")
    works(out / "run", 3)  # of one step, the one that fits is the newest
    works(out / "run", 3, tag="global_step3")
    fails("stage-named", out / "run" / "checkpoint-3")
    engine.destroy()
    engine = begin(Spec(2, zero=OFFLOAD, config={**WARM, "steps_per_print": 3}))
    works(out / "run", 3)
    tell(out, "said", said)


def nodes(out: Path) -> None:
    """Each rank is a node with a folder of its own: the newest step that all of them have."""
    rank = dist.get_rank()
    run = Path(os.environ["NODE_FOLDERS"].split(os.pathsep)[rank]) / "run"
    local = {"checkpoint": {"use_node_local_storage": True}}
    engine, sampler = begin(Spec(2, zero=OFFLOAD, config=local)), Sampler()
    with ckpt.Saver(engine, run, timeout=20) as saver:
        for step in (1, 2, 3):
            train(engine, 1, sampler)
            saver.save(step)
    dist.barrier()
    if rank:
        (run / "checkpoint-3" / "rng_state_1.state").unlink()
    dist.barrier()
    assert ckpt.find(run) == str(run / "checkpoint-2")
    for verify in ("structure", "data"):
        assert ckpt.resume(engine, run, verify=verify, timeout=20) == 2
    said = [caught(lambda: ckpt.resume(engine, run, tag="3", timeout=20))]
    dist.barrier()
    run.rename(run.with_name("away")) if rank else None
    dist.barrier()
    said += [caught(lambda: ckpt.resume(engine, run, timeout=20))]
    dist.barrier()
    (run if not rank else run.with_name("away")).rename(run.with_name("run" if rank else "away"))
    dist.barrier()
    said += [caught(lambda: ckpt.resume(engine, run, timeout=20))]
    tell(out, "said", said)


def alone(out: Path) -> None:
    """On one rank instead of two: the states are the same, and what changes is said."""
    engine, sampler = begin("zero1"), Sampler()
    extra = {"sampler": sampler}
    run = out / "zero1" / "fore"
    told = [caught(lambda: ckpt.resume(engine, run, extra=extra))]
    assert ckpt.resume(engine, run, extra=extra, reshard="auto") == HALF
    assert engine.global_steps == HALF and sampler.at == HALF
    train(engine, 1, sampler)
    tell(out, "alone", told)


def muon(out: Path) -> None:
    """From stage 2 to 3: in the order that the engine has, under ``zero.Init`` and without it."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the kernels of Muon are not what is tested
    config = {"optimizer": {"type": "Muon", "params": {"lr": 0.01}}}
    specs = [Spec(stage, zero={"reduce_scatter": False}, config=config) for stage in (2, 3)]
    engine = start(specs[0])
    train(engine, 2, Sampler())
    with ckpt.Saver(engine, out / "muon") as saver:
        saver.save(2)
    saved = finals(engine)
    engine.destroy()
    for model in (None, Tiny(specs[1])):
        engine = start(specs[1], model)
        if model is not None:  # what was resharded for the other order is there
            (error, _) = caught(lambda: ckpt.resume(engine, out / "muon"))  # noqa: B023
            assert "parameter 1 of the optimizer is" in error and "under zero.Init" in error, error
            dist.barrier()
            if not dist.get_rank():
                shutil.rmtree(out / "muon/checkpoint-2-z3-w2")
            dist.barrier()
        assert ckpt.resume(engine, out / "muon", reshard="auto", on_mismatch="warn") == 2
        found = finals(engine)
        assert all(torch.equal(found[name], value) for name, value in saved.items())
        engine.destroy()
        dist.barrier()


def memory(out: Path) -> None:
    """How much memory a resume takes, where the optimizer's states are in the host's: KIND "save",
    then "ckpt" or, to compare, "stock" in a new process."""
    engine, kind = begin(LARGE), os.environ["KIND"]
    if kind == "save":
        train(engine, 1, Sampler())
        with ckpt.Saver(engine, out / "large", preflight=False) as saver:
            saver.save(1)
        return
    gc.collect()
    base, peak, ends = held(), [held()], threading.Event()

    def watch() -> None:
        while not ends.wait(0.002):
            peak[0] = max(peak[0], held())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    if kind == "ckpt":
        assert ckpt.resume(engine, out / "large") == 1
    else:
        engine.load_checkpoint(str(out / "large" / "checkpoint-1"))
    took = time.monotonic() - began
    ends.set()
    thread.join()
    files = (out / "large" / "checkpoint-1" / "global_step1").glob("*optim*")
    part = max(file.stat().st_size for file in files)
    tell(out, f"memory-{kind}", [peak[0] - base, held() - base, part, took])


def turns(out: Path) -> None:
    """Ranks that read files which cannot be mapped: how many at a time, by the memory there is."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in (2, 3):
        spec = Spec(stage, world=world, zero=SMALL if stage == 3 else {}, config=OLD)
        engine, folder = begin(spec), out / f"old-{stage}"
        train(engine, 1, Sampler())
        engine.save_checkpoint(str(folder))
        files = mapped_loading.files_of(
            engine, folder, engine_tag := f"global_step{engine.global_steps}"
        )
        need, saved = mapped_loading.need(engine, files), finals(engine)
        assert need.reads == sum(path.stat().st_size for path in files) > need.keeps > 0
        needs: list[Any] = [None] * world
        dist.all_gather_object(needs, need)
        kept, most = sum(n.keeps for n in needs), max(n.reads - n.keeps for n in needs)

        def resume(places: float) -> Any:
            memory = int(kept + places * most)  # noqa: B023
            options = {"load_foreign": True, "on_mismatch": "warn", "memory": memory}
            return ckpt.resume(engine, folder, tag=engine_tag, timeout=30, **options)  # noqa: B023

        spans: dict[str, Any] = {}
        for places in (1, 2, world):
            train(engine, 1, Sampler())
            with spanned(spans.setdefault(str(places), [])):
                assert resume(places) == 1
            found = finals(engine)
            assert all(torch.equal(found[name], value) for name, value in saved.items())
        train(engine, 1, Sampler())
        spans["none"] = caught(lambda: resume(0.9))
        with spanned([], rank == 1):
            spans["failed"] = caught(lambda: resume(1))
        tell(out, f"turns-{stage}", spans)
        engine.destroy()


@contextmanager
def spanned(span: list[float], failing: bool = False) -> Iterator[None]:
    """Notes when this rank begins to read and when its turn is over; or has it fail there."""
    load, end = torch.load, LoadSlot.end

    def read(*args: Any, **options: Any) -> Any:
        if failing:
            raise RuntimeError("no luck")
        span.append(time.monotonic())  # one clock for all processes
        time.sleep(0.3)
        return load(*args, **options)

    def ended(self: Any) -> None:
        if not self.has_ended:
            span.append(time.monotonic())
        end(self)

    torch.load, LoadSlot.end = read, ended  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.load, LoadSlot.end = load, end  # type: ignore[method-assign]


def trainers(out: Path) -> None:
    """Trainer and Accelerate: all steps and a save in the middle; in a new process, the rest."""
    again = (out / "hf-2-0.json").exists()
    hugging_face(out, again)
    accelerate(out, again)


def hugging_face(out: Path, again: bool) -> None:
    import transformers as hf
    from hf_worker import digest, make

    from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints, ResumeCallback

    class Mapping(CommittedCheckpoints, hf.Trainer):
        pass

    class SavesOnce(hf.TrainerCallback):
        """Saves in the middle, and not at the end."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save &= state.global_step == HALF

    steps = {"max_steps": HALF + REST, "save_steps": HALF, "eval_steps": HALF, "rows": 16}
    for stage in (1, 2, 3):
        run = out / f"hf-{stage}"
        if not again:
            callbacks = [SavesOnce(), CheckpointCallback()]
            trainer, heard = make(hf.Trainer, run, stage, callbacks=callbacks, **steps)
            trainer.train()
            tell(out, run.name, [heard.losses, digest(trainer)])
            continue
        kind, loaded = Mapping if stage > 1 else hf.Trainer, list[str]()
        callbacks = [SavesOnce(), ResumeCallback()]
        trainer, heard = make(kind, run, stage, callbacks=callbacks, **steps)
        losses, ends = told(out, run.name)
        found = ckpt.find(run)
        assert found == str(run / f"checkpoint-{HALF}"), found
        with noting(loaded):
            trainer.train(resume_from_checkpoint=found)
        assert len(set(loaded)) == 2, loaded
        assert str(run) not in Path("/proc/self/maps").read_text(), "they still are"
        assert heard.start == HALF
        assert len(heard.losses) >= REST  # and what it evaluates at its end
        assert heard.losses == losses[-len(heard.losses) :], (heard.losses, losses)
        assert digest(trainer) == ends
        dist.barrier()
        path = run / f"checkpoint-{HALF}" / "rng_state_1.pth"
        if not dist.get_rank():  # which the Trainer itself would not miss
            path.unlink()
        dist.barrier()
        said = caught(lambda: ckpt.find(run / f"checkpoint-{HALF}"))  # noqa: B023
        assert "rng_state_1.pth: missing" in said[0], said
        trainer, _ = make(hf.Trainer, run, stage, callbacks=[ResumeCallback()], **steps)
        said = caught(lambda: trainer.train(resume_from_checkpoint=found))  # noqa: B023
        assert "rng_state_1.pth: missing" in said[0], said


@contextmanager
def noting(paths: list[str]) -> Iterator[None]:
    """Notes the files that are mapped instead of read."""
    load = mapped_loading.Mapped.load

    def noted(self: Any, path: str, map_location: Any = None) -> Any:
        paths.append(path)
        return load(self, path, map_location)

    mapped_loading.Mapped.load = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        mapped_loading.Mapped.load = load  # type: ignore[method-assign]


def accelerate(out: Path, again: bool) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate.state import PartialState
    from trainers_worker_accelerate import Training

    from ckpt.trainers.accelerate import load_state, save_state

    PartialState._reset_state()
    PartialState(cpu=True, backend="gloo")
    for stage in (1, 2, 3):
        run = out / f"accelerate-{stage}"
        training = Training(run, stage)
        assert load_state(training.accelerator, out / "none") == 0
        if not again:
            training.steps(HALF)
            save_state(training.accelerator, run, extra={"mine": training.counter})
            tell(out, run.name, training.steps(REST))
        else:
            counter = type(training.counter)()
            assert load_state(training.accelerator, run, extra={"mine": counter}) == HALF
            assert training.counter.count == counter.count == HALF
            assert str(run) not in Path("/proc/self/maps").read_text(), "it is still mapped"
            losses = training.steps(REST)
            assert losses == told(out, run.name), losses
            said = caught(lambda: load_state(training.accelerator, run))  # noqa: B023
            assert "extra mine was saved" in said[0], said
        training.end()


def held() -> int:
    """Bytes of this process that no file backs, which the kernel cannot take back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def main() -> None:
    import deepspeed

    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    if sys.argv[2] != "trainers":  # they do it themselves
        deepspeed.init_distributed(dist_backend="gloo")
    globals()[sys.argv[2]](Path(sys.argv[1]))
    leave()


if __name__ == "__main__":
    main()
