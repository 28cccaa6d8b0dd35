"""One rank of a training that is saved: ``saver_worker.py OUT_DIR PART``, one function each."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from live_worker import SMALL, caught, caught_while_absent, finals, require_same, start, train
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import OFFLOAD, Spec, tiny_llama

import ckpt
from ckpt import live
from ckpt.runs.manifest import check
from ckpt.runs.run import Run
from ckpt.saving.rank_work import RankWork
from ckpt.state import torch_file
from converters.errors import CheckpointError

CASES = {
    "zero0": Spec(0),
    "zero1": Spec(1),
    "zero2": Spec(2, "fp16"),
    "zero2-offload": Spec(2, zero=OFFLOAD),
    "zero3": Spec(3, zero=SMALL, zero_sized=True),
    "zero3-fp32": Spec(3, "fp32", zero={"sub_group_size": 20, **SMALL}),
}


class Sampler:
    """Something of the user's that has a place to go on from."""

    def __init__(self) -> None:
        self.state = {"at": 0, "order": torch.arange(5), "names": ("a", "b")}

    def state_dict(self) -> dict[str, Any]:
        return self.state


def tell(out: Path, what: Any) -> None:
    (out / f"told{dist.get_rank()}.json").write_text(json.dumps(what))


def cases(out: Path) -> None:
    """Every case saved in the foreground and in the background, in a training that goes on."""
    for name, spec in CASES.items():
        folder, began = out / name, time.monotonic()
        engine = start(spec)
        undisturbed = train(engine, 6)
        ends = finals(engine)
        engine.destroy()

        engine = start(spec)
        losses = train(engine, 2)
        engine.save_checkpoint(str(folder / "stock"), tag="global_step2", client_state={"n": 7})
        now = {"run": folder / "fore", "weights": "bf16", "max_shard_size": 400}
        extra = {"sampler": Sampler()}
        with ckpt.Saver(engine, **now) as saver:
            saver.save(2, {"eval_loss": torch.tensor(1.5)}, {"n": 7}, extra)
            newest = Run(folder / "fore").newest()
            assert newest is not None and newest.manifest is not None
            saved = newest.manifest.nbytes
            ratio = (saver.predicted or 0) / saved  # headers of 400-byte shards are not counted
            assert 0.93 < ratio < 1.05, (name, saver.predicted, saved)
        later = ckpt.Saver(engine, folder / "back", weights="bf16", background=True)
        later.save(2, client_state={"n": 7})
        losses += train(engine, 1)
        while later.flight is not None:  # committed by step alone
            later.step(3)
            time.sleep(0.01)
        tight = ckpt.Saver(engine, folder / "tight", background=True, memory=300, weights="fp32")
        tight.save(3)
        with ckpt.Saver(engine, folder / "whole", weights="fp32") as whole:
            whole.save(3)
        losses += train(engine, 1)
        tight.save(4, tier="weights")
        losses += train(engine, 2)
        tight.close()
        later.close()
        assert losses == undisturbed, (name, losses, undisturbed)
        require_same(finals(engine), ends, name)
        engine.destroy()

        engine = start(spec)
        for which in ("fore", "back"):
            path, client = engine.load_checkpoint(str(folder / which))  # the pointer has the tag
            assert path is not None and client["n"] == 7
        engine.destroy()
        if not dist.get_rank():
            print(f"{name} {time.monotonic() - began:.1f} s", flush=True)


class Broken:
    """A state that only one rank cannot save."""

    def __init__(self, by: int) -> None:
        self.by = by

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == self.by:
            raise RuntimeError("memory on fire")
        return {"at": 1}


class NoPickle:
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def failures(out: Path) -> None:
    """What goes wrong on one rank is told on both, commits nothing, and harms no later save."""
    rank = dist.get_rank()
    engine = start(CASES["zero3"])
    train(engine)
    told: dict[str, tuple[str, float]] = {}
    run = out / "run"
    saver = ckpt.Saver(engine, run, weights="bf16", timeout=20)
    steps = iter(range(1, 100))

    def works(saver: ckpt.Saver = saver) -> None:
        saver.save(step := next(steps))
        saver.wait()
        newest = Run(run).newest()
        assert newest is not None and newest.step == step, newest
        dist.barrier()

    def fails(name: str, saver: ckpt.Saver = saver, **kwargs: Any) -> None:
        before = Run(run).newest()
        dist.barrier()
        step = kwargs.pop("step", next(steps))

        def both() -> None:
            saver.save(step, **kwargs)
            saver.wait()

        told[name] = caught(both)
        dist.barrier()
        after = Run(run).newest()
        assert before is not None and after is not None and before.step == after.step
        assert not list(run.glob(".*.saving")), name
        works(saver)

    works()
    for by in (0, 1):
        fails(f"extra-{by}", extra={"broken": Broken(by)})
        fails(f"pickle-{by}", client_state={"n": NoPickle()} if rank == by else {})
    fails("plain", extra={"sampler": Sampler(), "bad": type("Odd", (), {"state_dict": object})()})
    fails("metric", metrics={"loss": "low"})
    fails("tier", tier="half")
    fails("step", step=70 + rank)
    real = torch_file.Captured.write

    def full(self: Any, path: Path, *rest: Any) -> Any:
        if rank == 1 and "optim" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return real(self, path, *rest)

    torch_file.Captured.write = full  # type: ignore[method-assign]
    fails_later = ckpt.Saver(engine, run, background=True, timeout=20)
    told["full"] = caught(saver.save, next(steps))
    fails_later.save(next(steps))  # it returns, and the failure is told by what comes next, once
    told["full-later"] = caught(_advanced, fails_later)
    fails_later.save(next(steps))
    told["full-wait"] = caught(fails_later.wait)
    torch_file.Captured.write = real  # type: ignore[method-assign]
    fails_later.wait()
    works(fails_later)
    fails_later.close()

    for name, late in (("absent", 1), ("absent-0", 0)):
        quick = ckpt.Saver(engine, run, timeout=2, preflight=False)
        told[name] = caught_while_absent(out / name, rank == late, lambda: quick.save(90))  # noqa: B023
        dist.barrier()
        works(quick)
    told["twice"] = caught(_two, out / "two", engine)
    fails_later.saved.clear()
    told["closed"] = caught(fails_later.save, 91)
    if rank == 1:  # between DeepSpeed's barriers, where the other rank would wait for ever
        engine.optimizer.state_dict = _broken
    told["state"] = caught(saver.save, 92)
    if rank == 1:
        del engine.optimizer.state_dict
    works()
    lower = ckpt.Saver(engine, out / "lower", retention=ckpt.Retention(last=1), timeout=20)
    for step in (50, 35, 40):
        lower.save(step)
    dist.barrier()
    steps_there = [c.step for c in Run(out / "lower").checkpoints()]
    assert steps_there == [40, 50], steps_there
    dist.barrier()
    began = time.monotonic()
    try:
        with ckpt.Saver(engine, out / "left", background=True, timeout=300) as left:
            left.save(1)
            if rank == 1:
                raise ValueError("the user's own")
    except ValueError as error:
        told["left"] = (str(error), time.monotonic() - began)
    told.setdefault("left", ("", 0.0))
    for name, options in (
        ("weights", {"weights": "fp8"}),
        ("every", {"every": 0}),
        ("memory", {"memory": "lots"}),
        ("place", {}),
    ):
        (out / "file").write_bytes(b"") if not rank else None
        place = out / "file" / "run" if name == "place" else run
        told[name] = caught(ckpt.Saver, engine, place, timeout=20, **options)
    works()
    if rank == 1:
        work = RankWork.write
        RankWork.write = lambda self: os._exit(0)  # type: ignore[method-assign]
        tell(out, told)
        assert work
    told["dies"] = caught(ckpt.Saver(engine, run, timeout=3, preflight=False).save, 95)
    tell(out, told)
    os._exit(0)  # what closes a training in order waits for the dead rank


def _broken() -> Any:
    raise RuntimeError("memory on fire")


def _advanced(saver: ckpt.Saver) -> None:
    while saver.flight is not None:
        saver.step(0)
        time.sleep(0.01)


def _two(run: Path, engine: Any) -> None:
    """Two savers of one folder and step at once: the second is told that it is in use."""
    one = ckpt.Saver(engine, run, background=True, timeout=20)
    other = ckpt.Saver(engine, run, timeout=20)
    one.save(1)
    try:
        other.save(1)
    finally:
        one.close()


def stop(out: Path) -> None:
    """Asked to stop by a signal on one rank: both save the same step once and end with 75."""
    engine = start(CASES["zero2"])
    kind = os.environ["STOP"]
    file = out / "stop" if kind == "file" else None
    asked = ckpt.Preemption(file=file, deadline=1e-3 if kind == "late" else 60)
    saver = ckpt.Saver(engine, out / "run", every=3, background=True, preemption=asked)
    for step in range(1, 1000):
        train(engine, 1)
        if step == 5 and kind == "all":
            os.kill(os.getpid(), signal.SIGTERM)
        elif step == 5 and kind == "launcher":
            if not dist.get_rank():
                os.kill(os.getppid(), signal.SIGUSR1)  # which ends it, and the group's store
        elif step == 5 and dist.get_rank() == 1 and kind != "file":
            os.kill(os.getpid(), signal.SIGUSR1 if kind == "usr1" else signal.SIGTERM)
        if step == 5 and file is not None:
            file.touch()
        if kind == "file":
            time.sleep(0.3)
        saver.step(step, {"loss": 1.0})
    raise AssertionError("it went on")


def ends(out: Path) -> None:
    """The process ends with a save under way: it is committed first, or the exit code says so."""
    engine = start(CASES["zero2"])
    train(engine)
    saver = ckpt.Saver(engine, out / "run", background=True, timeout=20)
    saver.save(1)
    saver.wait()
    if os.environ["END"] != "well" and dist.get_rank() == 1:

        def full(self: Any, path: Path, *rest: Any) -> Any:
            raise OSError(28, "No space left on device", str(path))

        torch_file.Captured.write = full  # type: ignore[method-assign]
    saver.save(2)


def kept(out: Path) -> None:
    """Cadence, retention and pointers through ``step``."""
    engine = start(CASES["zero3"])
    rule = ckpt.Retention(last=1, every=6, best=("loss", "min", 1))
    every = {"full": 2, "weights": 3}
    with ckpt.Saver(engine, out / "run", retention=rule, weights="bf16", every=every) as saver:
        for step in range(1, 10):
            train(engine, 1)
            saver.step(step, {"loss": abs(step - 4) + 1})


def llama(out: Path) -> None:
    """Hugging Face models, whole and with an adapter: folders that from_pretrained loads."""
    import peft
    import transformers as hf

    config = tiny_llama(tie_word_embeddings=True)
    adapter = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"
    )
    if not dist.get_rank():
        torch.manual_seed(7)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(out / "base")
    dist.barrier()
    for stage in (1, 2, 3):
        for name in ("whole", "adapter"):
            folder = out / f"{name}-{stage}"
            spec = Spec(stage, zero=SMALL if stage == 3 else {})
            model = hf.AutoModelForCausalLM.from_pretrained(out / "base")
            torch.manual_seed(8)
            if name == "adapter":
                model = peft.get_peft_model(model, adapter)
            engine = start(spec, model)
            for _ in range(2):
                ids = torch.randint(64, (2, 8))
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
            words = Words()
            with ckpt.Saver(engine, folder, weights="bf16", tokenizer=words) as saver:
                saver.save(2)
            everything = live.fp32_state_dict(engine)
            if everything is not None:
                torch.save(everything, folder / "live.pt")
            engine.destroy()


class Small(nn.Module):
    """Three tensors and a buffer, in two files: each is written by an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 4)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.layer(self.table(ids)) * self.scale.sum()).float().pow(2).mean()


def _operations(out: Path, saver: ckpt.Saver, step: int, by: int) -> list[str]:
    """The file operations of an undisturbed save on a rank, in order."""
    from faults import faults as layer

    log = out / f"operations{by}"
    if dist.get_rank() == by:
        layer.set_here(out / "run", log=log)
    saver.save(step)
    layer.stop_here()
    told = [[operation.call for operation in layer.journal(log)]]
    dist.broadcast_object_list(told, by)
    return told[0]


def _faults_at(calls: list[str]) -> Iterator[tuple[int, str, bool]]:
    """What is to fail how, and whether in the background.

    Any operation with an I/O error; what takes space as on a full disk or by a quota, and fsync by
    the kind that looks for it, each in the saver that the I/O error is not tried with.
    """
    full = itertools.cycle(("enospc", "edquot"))
    for at, call in enumerate(calls, 1):
        later = bool(at // 2 % 2)
        yield at, "eio", later
        if call in ("open", "mkdir", "truncate", "sendfile", "write", "pwrite", "pwritev"):
            yield at, next(full), not later
        if call == "fsync":
            yield at, "fsync", not later


def faults(out: Path) -> None:
    """Every file operation of a save fails once, on either rank, in four ways; preloaded."""
    from faults import faults as layer

    from ckpt.runs.lease import lease

    lease.BEAT = 3600.0  # its writes are no part of a save, and come when they like
    rank, run = dist.get_rank(), out / "run"
    engine = start(CASES["zero2"], Small())
    train(engine)
    kept = ckpt.Retention(last=1)
    options = {"retention": kept, "weights": "bf16", "max_shard_size": 120, "timeout": 20}
    savers = [ckpt.Saver(engine, run, background=later, **options) for later in (False, True)]
    ends = {"committed": 0, "refused": 0, "leftovers": 0}
    step, counts, failures = 1, [], []
    savers[0].save(step)
    for by in (0, 1):
        calls = _operations(out, savers[0], step := step + 1, by)
        counts.append(len(calls))
        for at, kind, later in _faults_at(calls):
            saver, before = savers[later], step
            step += 1
            dist.barrier()
            if rank == by:
                layer.set_here(run, at, kind)
            failure = ""
            try:
                saver.save(step)
                saver.wait()
            except CheckpointError as error:
                failure = str(error)
            layer.stop_here()
            dist.barrier()
            newest = Run(run).newest()
            where = (by, at, kind, failure)
            assert newest is not None and newest.step == (before if failure else step), where
            assert not failure or failure.startswith(f"save failed on rank {by}: "), where
            ends["refused" if failure else "committed"] += 1
            ends["leftovers"] += bool(failure and list(run.glob(".*.saving")))
            step = newest.step
            failures.append(bool(failure))
    told: list[Any] = [None, None]
    dist.all_gather_object(told, failures)
    assert told[0] == told[1]
    for by in (0, 1):  # the folder is read-only from now on, then writable again
        for saver in savers:
            dist.barrier()
            if rank == by:
                layer.set_here(run, 1, "erofs", sticky=True)
            failure, _ = caught(lambda: (saver.save(step + 1), saver.wait()))  # noqa: B023
            layer.stop_here()
            assert failure.startswith(f"save failed on rank {by}: "), failure
            assert failure.endswith("Read-only file system") and str(run) in failure, failure
            dist.barrier()
    newest = Run(run).newest()
    assert newest is not None and newest.step == step and newest.manifest is not None
    assert check(newest.folder, newest.manifest, data=True) == []
    tell(out, ends | {"counts": counts})


class Words:
    """A tokenizer, as far as a saver knows."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def nodes(out: Path) -> None:
    """Each of the two ranks is a node; whether they share a folder is up to the test."""
    local = os.environ["LOCAL"] == "1"
    spec = Spec(2, config={"checkpoint": {"use_node_local_storage": local}})
    engine = start(spec)
    train(engine)
    run = Path(os.environ["NODE_FOLDERS"].split(os.pathsep)[dist.get_rank()]) / "run"
    if os.environ["FAILS"] == "1":
        tell(out, caught(ckpt.Saver, engine, run, timeout=20))
        return
    with ckpt.Saver(engine, run, weights="bf16", background=True, timeout=20) as saver:
        saver.save(1)
        train(engine)
        saver.save(2)


def main() -> None:
    import deepspeed

    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    globals()[sys.argv[2]](Path(sys.argv[1]))
    if sys.argv[2] != "ends":  # that one is about an end without this
        dist.barrier()
        leave()


if __name__ == "__main__":
    main()
