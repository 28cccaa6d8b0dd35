"""One rank of a training in which one rank fails, in all ways: ``errors_worker.py OUT_DIR``.

Writes what each error would have printed. The last one fails at the end of the process.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from live_worker import start, train

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import Spec

import ckpt
from ckpt.distributed.ranks import RankGroup
from ckpt.engine.checkpoint_engine import CapturingEngine
from ckpt.runs.run import Run
from ckpt.saving import preflight
from ckpt.state import rng, torch_file
from converters.errors import CheckpointError

BY = 1  # the rank that fails


class Broken:
    """A state that only one rank cannot save."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == BY:
            raise RuntimeError("memory on fire in the middle of the night, by the second lamp")
        return {"at": 1}


def full(self: Any, path: Any = None, *_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device", str(path))


def printed(call: Callable[[], Any]) -> tuple[str, str]:
    """The error as text, and what an uncaught one prints."""
    try:
        call()
    except CheckpointError as error:
        return str(error), traceback.format_exc()
    raise AssertionError("no error")


def main(out: Path) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    rank, run = dist.get_rank(), out / "run"
    engine = start(Spec(2))
    train(engine, 1)
    saver = ckpt.Saver(engine, run, timeout=20)
    later = ckpt.Saver(engine, run, timeout=20, background=True)
    saver.save(1)
    (out / "folders/latest").mkdir(parents=True, exist_ok=True)
    told = {
        "extra": printed(lambda: saver.save(2, extra={"sampler": Broken()})),
        "other step": printed(lambda: saver.save(3 + (rank == BY))),
        "metric": printed(lambda: saver.save(3, {"loss": "low"})),
        "gone": printed(lambda: ckpt.find(out / "gone/checkpoint-5")),
        "folder": printed(lambda: ckpt.Saver(engine, out / "folders", timeout=20)),
        "option": printed(lambda: ckpt.resume(engine, run, on_mismatch="maybe")),  # type: ignore[arg-type]
    }
    keep, write, size = CapturingEngine._keep, torch_file.Captured.write, preflight.predicted
    if rank == BY:
        CapturingEngine._keep = torch_file.Captured.write = full  # type: ignore[method-assign]
        preflight.predicted = full
    told["state"] = printed(lambda: saver.save(4))
    told["preflight"] = printed(lambda: ckpt.Saver(engine, out / "other", timeout=20))
    CapturingEngine._keep = keep  # type: ignore[method-assign]
    told["files"] = printed(lambda: saver.save(5))

    def background() -> None:
        later.save(6)
        while later.flight is not None:
            later.step(7)
            time.sleep(0.01)

    told["background"] = printed(background)
    torch_file.Captured.write, preflight.predicted = write, size  # type: ignore[method-assign]

    def absent() -> None:
        alone = ckpt.Saver(engine, run, preflight=False, timeout=2)
        if rank == BY:
            RankGroup("save", 2)  # all ranks count their calls
            end = time.monotonic() + 60
            while (
                time.monotonic() < end
                and len(list(out.glob("gave-up*"))) < dist.get_world_size() - 1
            ):
                time.sleep(0.02)
            raise CheckpointError("rank 1: it was not there")
        try:
            alone.save(8)
        finally:
            (out / f"gave-up{rank}").touch()

    told["absent"] = printed(absent)
    dist.barrier()
    newest = Run(run).newest()
    assert newest is not None
    state = newest.folder / rng.NAME.format(BY)
    dist.barrier()
    if rank == BY:
        state.write_bytes(b"\0" * state.stat().st_size)
    dist.barrier()
    told["resume"] = printed(lambda: ckpt.resume(engine, run))
    (out / f"told{rank}.json").write_text(json.dumps(told))
    if rank == BY:
        torch_file.Captured.write = full  # type: ignore[method-assign]
    later.save(9)  # and the process ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
