"""``ckpt pull``, and what ``ckpt push`` keeps on this side: the journal, which is only a hint.

Whatever a crash leaves of a journal, the same push has to complete: where the Hub has thrown away
what came before, where it still has it, and where the commit was made and nobody heard of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hardening.crash import recording
from hardening.crash.recording import Recording
from hardening.crash.trace import look
from hardening.online import LFS, MODEL, SHARD, SHARDS, STATE, XET, Online, lean
from hardening.scenes import OUTPUT


def recordings(online: Online, work: Path) -> Iterator[Recording]:
    """Of pulls and pushes both ways; ``online`` has to last as long as what is made here."""
    for way in (LFS, XET):
        for name, repo in (("pull", SHARDS), ("pull state", STATE)):
            yield _pull(f"{name} {way}", way, repo, online, work / f"{name}-{way}")
        yield _push(f"push {way}", way, online, work / f"push-{way}")


def _pull(name: str, way: str, repo: str, online: Online, base: Path) -> Recording:
    online.restore()
    forks, root, trace = online.forks[way], base / "live", base / "trace"
    root.mkdir(parents=True)
    before, args = look(root), ["pull", repo, root / OUTPUT]
    ended = forks.run(args, root, trace=trace)
    if ended.status:
        raise RuntimeError(f"{name} failed: {ended.said}")

    def again() -> str:
        ended = forks.run(args, root)
        return ended.said.strip() if ended.status else ""

    return recording.recorded(name, root, before, trace, OUTPUT, again)


def _push(name: str, way: str, online: Online, base: Path) -> Recording:
    online.restore()
    old = online.held()
    forks, root, trace, kept = online.forks[way], base / "cache", base / "trace", base / "kept"
    root.mkdir(parents=True)
    checkpoint, env = lean(base / "run"), {"XDG_CACHE_HOME": str(root)}
    before, args = look(root), ["push", checkpoint, MODEL, *SHARD, "--transport", way]
    ended = forks.run(args, root, env=env, trace=trace)
    if ended.status:
        raise RuntimeError(f"{name} failed: {ended.said}")
    new = online.held()

    def pushed(what: str) -> str:
        shutil.rmtree(root)
        shutil.copytree(kept, root)
        ended = forks.run(args, root, env=env)
        if ended.status:
            return f"{what}: {ended.said.strip()}"
        return "" if online.held() == new != old else f"{what}: the branch holds something else"

    def again() -> str:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(root, kept)
        online.restore()
        wrong = pushed("the Hub has nothing")
        online.restore(contents=False)
        wrong = wrong or pushed("the Hub has all contents")
        return wrong or pushed("the commit was made")

    return replace(recording.recorded(name, root, before, trace, None, again), hint=True)
