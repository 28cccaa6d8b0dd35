"""One fault in one command, and what has to be true afterwards.

    failed         exit 1 and one line that names a file and the cause; an output is not there, a
                   run is in its old or its new state (an output is there, and whole, where the disk
                   fails for good when only the folder's own fsync was left to do)
    killed         the same without the line; an output may be there if it is whole
    interrupted    (EINTR, short reads and writes) done, with the same bytes
    done           whatever the fault was: exactly what is due can be seen

Always: what is only read is as it was; what is left is hidden or called .partial; the command run
again, with ``ckpt doctor --fix`` behind it at most, gives what it gives undisturbed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import faults
from faults.forks import Ended, Forks

from hardening.crash import judging
from hardening.crash.disk import Tree
from hardening.folders import Folder
from hardening.scenes import OUTPUT, Scene

READS = {"open-", "read", "readv", "pread", "preadv"}
SPACE = {"open", "write", "pwrite", "pwritev", "writev", "truncate", "fallocate", "mkdir", "link"}
MOVES = {"read", "readv", "pread", "preadv", "write", "writev", "pwrite", "pwritev"}
SLOW = MOVES | {"open", "open-", "truncate", "fallocate", "fsync"}
CAUSES = {
    "eio": "Input/output error",
    "fsync": "Input/output error",
    "enospc": "No space left on device",
    "edquot": "Disk quota exceeded",
}
LEFT = (".partial", ".saving", ".trash", ".torn")


@dataclass(frozen=True, slots=True)
class Fault:
    """``do`` at operation ``at``, a ``call``, and from then on if it is ``sticky``."""

    at: int
    do: faults.Fault
    call: str
    sticky: bool = False

    @property
    def kind(self) -> str:
        """Its name."""
        return f"{self.do}{' for good' if self.sticky else ''}"

    @property
    def kills(self) -> bool:
        """Whether it ends the process."""
        return self.do in ("kill", "torn", "term")


def faults_at(operation: faults.Operation) -> Iterator[Fault]:
    """All that can go wrong at an operation.

    Killed while it reads, a process leaves what it leaves killed at its next change.
    """
    call, at = operation.call, operation.number
    called = f"{call} {operation.path.rpartition('/')[2]}"

    def fault(do: faults.Fault, sticky: bool = False) -> Fault:
        return Fault(at, do, called, sticky)

    yield fault("eio")
    if call not in READS:
        yield from (fault("kill"), fault("term"), fault("eio", True))
    if call in SPACE:
        yield from (fault("enospc"), fault("edquot"), fault("enospc", True))
    if call in SLOW:
        yield fault("eintr")
    if call == "fsync":
        yield fault("fsync", True)
    if call in MOVES and operation.nbytes > 1:
        yield from (fault("short"), fault("short", True))
        if call not in READS:
            yield fault("torn")


class Probe:
    """A command in a folder of its own."""

    def __init__(self, scene: Scene, base: Path, forks: Forks):
        base.mkdir(parents=True)
        self.scene, self.base, self.forks = scene, base / "base", forks
        self.folder = Folder(self.base, base / "blobs")
        self.args = scene.args(self.base)
        scene.build(self.base)
        self.old = self.folder.look()
        log = base / "journal"
        ended = self.run(log=log, reads=1)
        if ended.status:
            raise RuntimeError(f"{scene.name} failed: {ended.said}")
        self.new = self.folder.look()
        self.journal = [op for op in faults.journal(log) if op.call != "chmod"]
        self.operations = len(self.journal)
        self.ends: Counter[str] = Counter()
        self.verdicts = judging.Folders({})

    def run(self, **fault: object) -> Ended:
        """Runs the command."""
        return self.forks.run(self.args, self.base, not self.scene.changes, **fault)

    def faults(self) -> list[Fault]:
        """All faults of all operations."""
        return [fault for operation in self.journal for fault in faults_at(operation)]

    def check(self, fault: Fault) -> list[str]:
        """Runs the command with a fault; what is wrong."""
        self.folder.make(self.old)
        ended = self.run(at=fault.at, do=fault.do, sticky=fault.sticky, reads=1)
        after = dict(self.folder.look())
        found = [*self.judge(fault, ended, after)] or [*self.again(after)]
        said = ended.said.strip().replace("\n", " / ")
        return [
            f"{line} ({fault.kind} at {fault.at}, {fault.call}; said: {said})" for line in found
        ]

    def judge(self, fault: Fault, ended: Ended, after: Tree) -> Iterator[str]:
        """What is wrong right after the fault."""
        how = "done" if ended.status == 0 else "killed" if ended.status < 0 else "failed"
        self.ends[how] += 1
        if ended.hung:
            yield "it hung"
        if judging.below(after, "source") != judging.below(self.old, "source"):
            yield "the source was changed"
        old, new, now = (judging.below(tree, "live") for tree in (self.old, self.new, after))
        yield from self.leftovers(old, now)
        if how == "done":
            if not judging.same(judging.visible(now), judging.visible(new)):
                yield f"exit 0, and it differs: {judging.difference(now, new)}"
            return
        if fault.do in ("eintr", "short") or fault.kills != (how == "killed"):
            yield f"exit {ended.status}"
        if how == "failed" and not fault.kills:
            yield from self.words(fault, ended)
        if self.scene.output:
            # where no rename works any more, that of the output cannot be taken back, either
            fits = (old, new) if fault.kills or fault.kind == "eio for good" else (old,)
            seen = judging.visible(now)
            if not any(judging.same(seen, judging.visible(each)) for each in fits):
                yield f"exit {ended.status}, and there is {judging.difference(now, old)}"
        else:
            root = self.base / "live"
            yield from judging.of_run(root, now, old, new, False, self.verdicts)

    def words(self, fault: Fault, ended: Ended) -> Iterator[str]:
        """What is wrong with what it said."""
        lines = ended.said.strip().splitlines()
        lines = [line for line in lines if "is a torn checkpoint" not in line]  # and takes room
        if not self.scene.changes:  # the verdict is on stdout
            lines = [line for line in lines if CAUSES.get(fault.do, "") in line][:1]
        if len(lines) != 1 or (self.scene.changes and not lines[0].startswith("ckpt: ")):
            yield f"{len(lines)} lines"
        elif CAUSES.get(fault.do, "") not in lines[0]:
            yield "the cause is not said"
        elif self.scene.changes and str(self.base) not in lines[0]:
            yield "no file is named"

    def leftovers(self, old: Tree, now: Tree) -> Iterator[str]:
        """What is left and nobody would recognise."""
        for path in now:
            name = path.partition("/")[0]
            fits = name in (OUTPUT, "latest", "best") or name.endswith(LEFT)
            if name not in old and not fits and path == name:
                yield f"{path} is left"

    def again(self, after: Tree) -> Iterator[str]:
        """What is wrong once the command was run again, and what is left was mended."""
        new = judging.below(self.new, "live")
        now = judging.below(after, "live")
        if judging.same(now, new) and self.scene.changes:
            return
        ended = self.run()
        if ended.status and not judging.same(judging.visible(now), judging.visible(new)):
            self.folder.look()
            yield f"run again, exit {ended.status}: {ended.said.strip()}"
            return
        now = judging.below(self.folder.look(), "live")
        if not judging.same(now, new):
            self.forks.run(["doctor", self.base / "live", "--fix"], self.base)
            now = dict(judging.below(self.folder.look(), "live"))
            if self.scene.output:
                now.pop("latest", None)  # the folder is no run; doctor takes it for one
        if not judging.same(now, new):
            yield f"run again, it differs: {judging.difference(now, new)}"
