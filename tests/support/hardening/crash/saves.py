"""Saves of two ranks as recordings: of each ZeRO stage, in the background, and over an older one.

Each rank runs this as a program, ``saves.py FOLDER/CASE``, as a fork of the warm process that has
the library of ``faults``. A case leaves in FOLDER/CASE the run, what it was before (``before``) and
the trace of both ranks.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from paths import PATHS

sys.path[:0] = PATHS
import ending  # noqa: E402
import extensions  # noqa: E402
import warm_ranks  # noqa: E402
from faults import faults  # noqa: E402

STEP = 2  # of the save that is recorded
LIMIT = 300.0  # seconds for a save, where DeepSpeed compiles an extension, too


@dataclass(frozen=True, slots=True)
class Case:
    """A save: of a stage; in the background; over the checkpoint of an earlier save; beside those
    of ``another`` run, which has one of that name.
    """

    stage: int
    background: bool = False
    over: bool = False
    another: bool = False


CASES = {
    "save zero2": Case(2),
    "save zero3": Case(3),
    "save zero1 background": Case(1, background=True),
    "save zero0": Case(0),
    "save zero2 over": Case(2, over=True),
    "save zero2 beside": Case(2, another=True),
    "save zero1 beside background": Case(1, background=True, another=True),
}


def recordings(
    work: Path, say: Callable[[str], object], names: tuple[str, ...] = tuple(CASES)
) -> Iterator[Any]:
    """Saves, and yields what each did."""
    from hardening.crash.recording import recorded

    say(f"saving with two ranks: {', '.join(names)}")
    for name in names:
        folder = work / name
        _save(folder)
        before = pickle.loads((folder / "before").read_bytes())
        run = folder / "run"
        again = Again(run, CASES[name].over)
        made = recorded(name, run, before, folder / "trace", None, again)
        again.new = made.new
        yield made


def _save(folder: Path) -> None:
    """Runs the case that a folder is called by; ``RuntimeError`` if a rank fails."""
    folder.mkdir(parents=True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the warm process reads it, too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    preloaded = {"LD_PRELOAD": faults.environment(folder)["LD_PRELOAD"]}
    ended = warm_ranks.run(
        __file__,
        [folder],
        ranks=2,
        limit=LIMIT,
        environment=extensions.environment() | preloaded,
    )
    if ended.returncode:
        raise RuntimeError(f"{folder.name} failed: {ended.stderr[-3000:]}")


class Again:
    """The save once more, by the commit of one rank that writes the same files."""

    def __init__(self, run: Path, over: bool):
        self.run, self.over, self.new = run, over, {}

    def __call__(self) -> str:
        from ckpt.distributed.ranks import RankGroup
        from ckpt.folders import filenames
        from ckpt.runs import manifest
        from ckpt.runs.lineage import Line
        from ckpt.runs.retention import Retention
        from ckpt.saving.commit.commit import Commit, Facts
        from ckpt.saving.commit.nodes import Nodes
        from ckpt.saving.commit.pointers import after_commit
        from converters.storage import local

        _alone()
        final = self.run / f"checkpoint-{STEP}"
        start = f"{final.name}/"
        made = {p[len(start) :]: held for p, held in self.new.items() if p.startswith(start)}
        data = made.pop(filenames.MANIFEST)
        held = json.loads(data)
        kept = ("step", "tag", "tier", "stage", "versions", "metrics", "progress")
        line = Line.of(manifest.loads(data, final / filenames.MANIFEST))
        facts = Facts(line=line, **{name: held[name] for name in kept})
        commit = Commit(RankGroup("save", 20.0), Nodes(0, 1, True, False), final, facts)
        commit.begin()
        for name, content in made.items():
            if content is None:
                (commit.folder / name).mkdir()
            elif name != "latest":
                local.write_file(commit.folder / name, content)
                commit.files[name] = manifest.digest(commit.folder / name)
        commit.settle()
        commit.finish()
        after_commit(self.run, Retention(last=1), final, line)
        return ""


def _alone() -> None:
    """A process group of this process, if there is none."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def save(folder: Path) -> None:
    """One rank: a save that is there before, and the one that is recorded."""
    import torch.distributed as dist
    from fixture_specs import Spec
    from live_worker import SMALL, start, train

    import ckpt
    from ckpt.saving.commit import identity
    from hardening.crash.trace import look

    case, run = CASES[folder.name], folder / "run"
    engine = start(Spec(case.stage, zero=SMALL if case.stage == 3 else {}))
    options = {"weights": "bf16", "timeout": 60, "background": case.background}
    saver = ckpt.Saver(engine, run, retention=ckpt.Retention(last=1), **options)
    train(engine, 1)
    if case.another:
        saver.save(STEP)
        saver.wait()
        identity._launches.clear()  # as if by another process
        identity.begin(engine)
    saver.save(STEP if case.over else STEP - 1)
    saver.wait()
    train(engine, 1)
    dist.barrier()
    if not dist.get_rank():
        (folder / "before").write_bytes(pickle.dumps(look(run)))
    dist.barrier()
    faults.set_here(run, trace=folder / "trace")
    dist.barrier()
    saver.save(STEP)
    saver.close()
    dist.barrier()
    faults.stop_here()


if __name__ == "__main__":
    save(Path(sys.argv[1]))
    ending.leave()
