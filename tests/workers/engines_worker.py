"""One rank of a training of two engines that are saved as one: ``engines_worker.py OUT_DIR``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from live_worker import SMALL, caught, start, train

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import Spec

import ckpt
from ckpt import live
from ckpt.runs.run import Run

SPECS = {"actor": Spec(3, zero=SMALL), "critic": Spec(2, "fp32", tied=False)}
END = 6


def pair() -> dict[str, Any]:
    """Both engines, always the same."""
    made = {name: start(spec) for name, spec in SPECS.items()}
    torch.manual_seed(100 + dist.get_rank())
    return made


def destroy(engines: Mapping[str, Any]) -> None:
    for engine in engines.values():
        engine.destroy()


def steps(engines: Mapping[str, Any], count: int) -> list[float]:
    """The losses of some steps, in each of which both are trained."""
    return [loss for _ in range(count) for engine in engines.values() for loss in train(engine, 1)]


def ends(engines: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name, engine in engines.items()
        for key, value in (live.fp32_state_dict(engine, None) or {}).items()
    }


def main(out: Path) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    engines = pair()
    undisturbed = steps(engines, END)
    values = ends(engines)
    destroy(engines)

    engines = pair()
    losses = steps(engines, 2)
    with ckpt.Saver(engines, out / "fore", weights="bf16", max_shard_size=400) as saver:
        saver.save(2, {"loss": 1.0}, {"n": 7})
        newest = Run(out / "fore").newest()
        assert newest is not None and 0.8 < (saver.predicted or 0) / newest.nbytes < 1.2
        with_weights = saver.predicted
    for name, engine in engines.items():
        engine.save_checkpoint(str(out / "stock" / name), tag="global_step2", client_state={"n": 7})
    later = ckpt.Saver(engines, out / "back", weights="bf16", background=True)
    later.save(2, client_state={"n": 7})
    losses += steps(engines, 1)
    while later.flight is not None:
        later.step(3)
        time.sleep(0.01)
    later.save(3, tier="weights")
    later.close()
    tight = ckpt.Saver(engines, out / "tight", weights="fp32", background=True, memory=300)
    tight.save(3)
    tight.close()
    losses += steps(engines, END - 3)
    assert losses == undisturbed
    for key, value in ends(engines).items():
        assert torch.equal(value, values[key]), key
    told = {"more": [with_weights, saver.predicted], **failures(out, engines)}
    destroy(engines)

    for which, step in (("fore", 2), ("back", 2), ("tight", 3)):
        engines, state = pair(), {}
        reached = ckpt.resume(engines, out / which, client_state=state)
        assert reached == step and (which == "tight" or state == {"n": 7}), (reached, state)
        assert steps(engines, END - step) == undisturbed[2 * step :], which
        for key, value in ends(engines).items():
            assert torch.equal(value, values[key]), (which, key)
        destroy(engines)

    engines = pair()  # each alone, with DeepSpeed's own function
    for name, engine in engines.items():
        path, client = engine.load_checkpoint(str(out / "fore/checkpoint-2" / name))
        assert path is not None and client["n"] == 7
    assert ckpt.resume(engines, out / "nothing yet") == 0
    assert ckpt.resume(engines, out / "fore", load_module_only=True) == 0
    told |= refusals(out, engines)
    (out / f"told{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()


def failures(out: Path, engines: Mapping[str, Any]) -> dict[str, Any]:
    """What one engine cannot save, none does."""
    from ckpt.engine.checkpoint_engine import CapturingEngine  # a test imports this module

    saver = ckpt.Saver(engines, out / "fails", timeout=20)
    told = {}
    for number, name in enumerate(engines):
        keep = CapturingEngine._keep

        def broken(self: Any, path: Path, state: Any, name: str = name, keep: Any = keep) -> None:
            if path.parent.parent.name == name and dist.get_rank() == 1:
                raise RuntimeError(f"no {name} today")
            keep(self, path, state)

        CapturingEngine._keep = broken  # type: ignore[method-assign]
        told[f"save {name}"], _ = caught(saver.save, number + 1)
        CapturingEngine._keep = keep  # type: ignore[method-assign]
    assert not Run(out / "fails").checkpoints()
    saver.save(5)
    saver.close()
    told["name"], _ = caught(ckpt.Saver, {"a/b": engines["actor"]}, out / "fails")
    return told


def refusals(out: Path, engines: Mapping[str, Any]) -> dict[str, str]:
    """What is resumed otherwise than it was saved."""
    with ckpt.Saver(engines["actor"], out / "single") as saver:
        saver.save(1)
    swapped = {"actor": engines["critic"], "critic": engines["actor"]}
    tries: dict[str, tuple[Any, Any]] = {
        "others": ({"actor": engines["actor"], "judge": engines["critic"]}, out / "fore"),
        "one": (engines["actor"], out / "fore"),
        "single": (engines, out / "single"),
        "stages": (swapped, out / "fore"),
    }
    return {name: caught(ckpt.resume, *given)[0] for name, given in tries.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
