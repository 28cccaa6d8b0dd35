"""``ckpt push`` and ``ckpt pull`` with every file operation failing once, against the local Hub.

BASE/source/    the checkpoint that is pushed
BASE/cache/     $XDG_CACHE_HOME: the journal of a push
BASE/live/      the output of a pull; the folder of a push that stages

Of a pull the same has to be true as of any command with an output (``probing``). Of a push:

done           the branch holds exactly the new files, by digests that the server computes from its
               own bytes; whatever else failed, a fault in the journal ends so
failed         one line that names a file and the cause; the branch holds exactly the old files
killed         the branch holds the old files or the new ones

The checkpoint is as it was; nothing is left but journals and what is called .partial; the same push
again completes, and leaves no more than the journal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import faults
from faults.forks import Ended

from hardening.crash import judging
from hardening.crash.disk import Tree
from hardening.faults.probing import Fault, Probe
from hardening.online import LFS, MODEL, SHARD, SHARDS, STATE, XET, Online, lean
from hardening.scenes import OUTPUT, Scene


@dataclass(frozen=True, slots=True)
class Case:
    """A command against the Hub, and the client's way."""

    scene: Scene
    way: str
    pushes: bool

    @property
    def name(self) -> str:
        """The command's."""
        return self.scene.name

    def probe(self, base: Path, online: Online) -> Pull:
        """The command, in a folder of its own."""
        return (Push if self.pushes else Pull)(self, base, online)


def cases() -> Iterator[Case]:
    """All of them. What is a file already goes by other means than a shard that is made."""
    for way in (LFS, XET):
        send = ("--transport", way)
        yield _push(f"push {way}", way, *SHARD, *send)
        yield _push(f"push state {way}", way, "--include-training-state", *send)
        yield _push(f"push stage {way}", way, *SHARD, stage=True)
        yield _pull(f"pull {way}", way, SHARDS)
        yield _pull(f"pull state {way}", way, STATE)


def _push(name: str, way: str, *more: str, stage: bool = False) -> Case:
    def build(base: Path) -> None:
        lean(base / "source")
        (base / "live").mkdir()
        (base / "cache").mkdir()

    def args(base: Path) -> list[object]:
        staging = ["--transport", "stage", "--stage-dir", base / "live"] if stage else []
        return ["push", base / "source/checkpoint-2", MODEL, *more, *staging]

    return Case(Scene(name, build, args), way, True)


def _pull(name: str, way: str, repo: str) -> Case:
    def build(base: Path) -> None:
        (base / "live").mkdir()

    return Case(Scene(name, build, lambda b: ["pull", repo, b / "live" / OUTPUT], True), way, False)


class Pull(Probe):
    """A pull in a folder of its own; the Hub is put back before each."""

    def __init__(self, case: Case, base: Path, online: Online):
        self.online, self.log = online, base / "log"
        self.env = {"XDG_CACHE_HOME": str(base / "base/cache")}
        online.restore()
        super().__init__(case.scene, base, online.forks[case.way])

    def run(self, **fault: object) -> Ended:
        """Runs the command; what it did is in ``self.log``."""
        self.log.unlink(missing_ok=True)
        fault = {"log": self.log} | fault
        return self.forks.run(self.args, self.base, env=self.env, **fault)

    def check(self, fault: Fault) -> list[str]:
        """Runs the command with a fault; what is wrong."""
        self.online.restore()
        return super().check(fault)


class Push(Pull):
    """A push from a folder of its own."""

    def __init__(self, case: Case, base: Path, online: Online):
        online.restore()
        self.before = online.held()
        super().__init__(case, base, online)
        self.after = online.held()
        if self.before == self.after:
            raise RuntimeError(f"{case.scene.name} changes nothing")
        self.talk = self.run().said.split("\n")  # warnings

    def judge(self, fault: Fault, ended: Ended, after: Tree) -> Iterator[str]:
        """What is wrong right after the fault."""
        how = "done" if ended.status == 0 else "killed" if ended.status < 0 else "failed"
        self.how, self.failed = how, self.hints()
        self.ends[how] += 1
        if ended.hung:
            yield "it hung"
        yield from self.on_disk(after)
        now = self.online.held()
        if how == "done":
            if now != self.after:
                yield f"exit 0, and on the Hub differs {_difference(now, self.after)}"
            return
        if fault.do in ("eintr", "short") or fault.kills != (how == "killed"):
            yield f"exit {ended.status}"
        if how == "failed" and self.failed and all(self.failed):
            yield "it failed for its journal"
        if how == "failed" and not fault.kills:
            yield from self.words(fault, ended)
        fits = (self.before, self.after) if how == "killed" else (self.before,)
        if now not in fits:
            yield f"exit {ended.status}, and on the Hub differs {_difference(now, self.before)}"

    def words(self, fault: Fault, ended: Ended) -> Iterator[str]:
        """What is wrong with what it said; warnings may come before."""
        lines = [line for line in ended.said.splitlines() if line not in self.talk]
        yield from super().words(fault, Ended(ended.status, "\n".join(lines), 0, False))

    def on_disk(self, after: Tree) -> Iterator[str]:
        """What is wrong with what is left on this side."""
        if judging.below(after, "source") != judging.below(self.old, "source"):
            yield "the checkpoint was changed"
        for path, held in after.items():
            known = path in self.old or path in ("cache/ckpt", "cache/ckpt/push")
            journal = path.startswith("cache/ckpt/push/") and path.endswith(".json")
            if not (known or journal or ".partial" in path):
                yield f"{path} is left ({len(held or b'')} bytes)"

    def hints(self) -> list[bool]:
        """Of all that failed, whether it was below the cache."""
        cache = f"{self.base.resolve()}/cache"
        failed = (op.path for op in faults.journal(self.log) if op.call.endswith("!"))
        return [path.startswith(cache) for path in failed]

    def again(self, after: Tree) -> Iterator[str]:
        """What is wrong once the command was run again; not where that would do nothing."""
        if self.how == "done" and not any(self.failed):
            return
        ended = self.run()
        left = dict(self.folder.look())
        if ended.status:
            yield f"run again, exit {ended.status}: {ended.said.strip()}"
        elif (now := self.online.held()) != self.after:
            yield f"run again, on the Hub differs {_difference(now, self.after)}"
        elif more := list(judging.below(left, "live")):
            yield f"run again, {more[0]} is left"
        yield from self.on_disk(left)


def _difference(one: dict[str, str], other: dict[str, str]) -> str:
    return ", ".join(sorted({name for name, _ in one.items() ^ other.items()}))
