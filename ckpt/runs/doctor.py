"""What a crash left of a run, found and put right.

Nothing that anybody may still be writing is touched: a save holds a lock on ``.lock`` in its
staging folder, a conversion one on ``plan.json`` in its own, and where no lock can tell, what
changed in the last ten minutes is left alone. No checkpoint is ever deleted: one that cannot be
read is renamed, so that nothing takes it for a checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path

from ckpt import renaming
from ckpt.runs import (
    amending,
    completeness,
    engines,
    lease_watch,
    leftovers,
    locks,
    manifest,
    pruning,
    slim,
    torn,
)
from ckpt.runs.run import (
    POINTERS,
    Checkpoint,
    Run,
    is_checkpoint,
    is_numbered,
    leading,
    members,
    require_read,
)
from ckpt.staging import RECORD
from converters import files
from converters.errors import CheckpointError
from converters.folder import is_tag_folder

QUIET = 600.0  # seconds without a change, after which nobody is taken to be writing
_STAGING = {".saving": locks.LOCK, ".partial": RECORD}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to put right: where, what is wrong, and what ``--fix`` does about it.

    ``remedy`` says it; without one (``None``) it is left to the user.
    """

    path: Path
    what: str
    remedy: str | None = None
    mend: Callable[[], object] | None = None


def diagnose(run: Run) -> list[Finding]:
    """Everything in the folder that is not as a finished save leaves it; changes nothing."""
    checkpoints = run.checkpoints()
    ours = any(c.manifest or any(c.folder.glob("*/*_states.pt*")) for c in checkpoints)
    found = [*_staging(run), *(f for c in checkpoints for f in _inside(c, ours))]
    found += [*_doubles(checkpoints), *_stray(run.path), *_leases(run.path)]
    return [*found, *_pointers(run, checkpoints)]


def mend(run: Run) -> tuple[list[Finding], list[Finding]]:
    """Puts right what can be; returns what was, and what is left to the user.

    Looks again after each round, since pointers depend on which folders are whole.
    """
    done: list[Finding] = []
    while todo := [finding for finding in diagnose(run) if finding.mend]:
        for finding in todo:
            assert finding.mend is not None
            finding.mend()
            done.append(finding)
        if len(done) > 100_000:
            raise CheckpointError(f"{run.path} changes while it is mended; stop what writes it")
    return done, diagnose(run)


def changed_lately(folder: Path) -> bool:
    """Whether anything in the folder changed within ``QUIET`` seconds.

    By the inodes' times: copying with ``rsync -a`` sets back those of the contents.
    """
    newest = 0.0
    for where, _, names in os.walk(folder):
        for path in (where, *(os.path.join(where, name) for name in names)):
            try:
                newest = max(newest, os.lstat(path).st_ctime)
            except OSError:
                return True  # it vanished: somebody is at it
    return time.time() - newest < QUIET


def _staging(run: Run) -> Iterator[Finding]:
    for path in leftovers.abandoned(run.path):
        what = "left by the start of a training that failed"
        yield Finding(path, what, "remove it", partial(leftovers.remove, path))
    for path in pruning.trash(run):
        what = "a deletion that was interrupted"
        yield Finding(path, what, "remove it", partial(pruning.remove, path))
    for entry in sorted(os.scandir(run.path), key=lambda entry: entry.name):
        path = Path(entry.path)
        if not entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        if path.suffix in _STAGING and not _at_work(path, _STAGING[path.suffix]):
            what = "a save" if path.suffix == ".saving" else "a conversion"
            idle = partial(_remove_idle, path, _STAGING[path.suffix])
            yield Finding(path, f"{what} that did not finish", "remove it", idle)


def _at_work(folder: Path, name: str) -> bool:
    """Whether somebody works in a staging folder, or may."""
    lock = locks.exclusive(folder / name)
    if lock is None:
        return True
    with lock:
        return lock.fd is None and changed_lately(folder)


def _remove_idle(folder: Path, name: str) -> None:
    """Removes a staging folder while holding its lock, unless work began in it just now."""
    lock = locks.exclusive(folder / name)
    if lock is not None:
        with lock:
            if lock.fd is not None or not changed_lately(folder):
                pruning.remove(folder)


def _inside(checkpoint: Checkpoint, ours: bool) -> Iterator[Finding]:
    if (found := _amendable(checkpoint)) is not None:
        yield found
    if checkpoint.committed:
        yield from _unfinished_slim(checkpoint)
        yield from _inner_latest(checkpoint)
    elif found is None:
        yield from _not_committed(checkpoint, ours)
    yield from _stray(checkpoint.folder, checkpoint)


def _amendable(checkpoint: Checkpoint) -> Finding | None:
    """A manifest that lists what was deleted by hand, where the rest is a checkpoint."""
    made = amending.amendment(checkpoint)
    if made is None or locks.in_use(checkpoint.folder):
        return None
    more = f" (and {len(checkpoint.deleted) - 1} more)" if len(checkpoint.deleted) > 1 else ""
    what = f"lists {checkpoint.deleted[0]}{more}, which was deleted: {made.what}"
    mend = partial(amending.amend, checkpoint)
    return Finding(checkpoint.folder / manifest.NAME, what, "take it off the manifest", mend)


def _unfinished_slim(checkpoint: Checkpoint) -> Iterator[Finding]:
    left = slim.leftovers(checkpoint)
    if left and not locks.in_use(checkpoint.folder):
        what = f"weights only, but {len(left)} files of the full checkpoint are still there"
        yield Finding(checkpoint.folder, what, "remove them", partial(_finish_slim, checkpoint))


def _finish_slim(checkpoint: Checkpoint) -> None:
    slim.execute(slim.plan(checkpoint))


def _inner_latest(checkpoint: Checkpoint) -> Iterator[Finding]:
    held = checkpoint.manifest
    if held is None or held.tier != "full" or held.tag is None or held.node:
        return  # only the first node's folder has one
    for name, tag in engines.pointers(held.tag, engines.names(held)).items():
        path = checkpoint.folder / name
        named = Run(path.parent).target("latest")
        if named != tag:
            what = "is missing" if named is None else f"names {named!r}, expected {tag}"
            yield Finding(path, what, f"name {tag}", partial(_write, path, tag))


def _write(path: Path, tag: str) -> None:
    files.write_file(path, tag.encode())
    files.sync_folder(path.parent)


def _not_committed(checkpoint: Checkpoint, ours: bool) -> Iterator[Finding]:
    """A folder without a valid manifest: torn, or whole and only not committed, or being saved.

    ``ours`` is whether anything in the run is DeepSpeed's; else nothing is judged.
    """
    folder, held = checkpoint.folder, checkpoint.manifest
    if pruning.is_trash(folder):
        return  # said already
    if held is None and is_tag_folder(folder):
        return  # the run is a save_dir of DeepSpeed itself
    if changed_lately(folder) or locks.in_use(folder):
        hint = _proven(checkpoint)
        yield Finding(folder, f"not committed, changed in the last minutes: {hint}")
        return
    if held is not None and held.tag and (lost := _lost_latest(folder, held)):
        for name, tag in lost.items():
            write = partial(_write, folder / name, tag)
            yield Finding(folder / name, "is missing or cut short", f"name {tag}", write)
        return
    if held is None and (whole := torn.only_tag(folder)) is not None:
        path = folder / "latest"
        what = f"is missing or leads nowhere, and {whole} is whole"
        yield Finding(path, what, f"name {whole}", partial(_write, path, whole))
        return
    aside = folder.with_name(f".{folder.name}.torn")
    if renaming.is_arriving(aside):
        what = f"torn, and moved to {aside.name} in part"
        yield Finding(folder, what, "move the rest", partial(_rename, folder, aside))
        return
    if ours and is_numbered(folder) and (why := torn.why(folder)) is not None:
        mend = None if aside.exists() else partial(_rename, folder, aside)
        remedy = f"rename it to {aside.name}" if mend else None
        yield Finding(folder, f"torn: {why}", remedy, mend)
        return
    yield Finding(folder, f"not committed: {_proven(checkpoint)}")


def _proven(checkpoint: Checkpoint) -> str:
    """What an uncommitted folder is: whole and of whom, or why it is not, and the way on."""
    if checkpoint.why != manifest.ABSENT:
        return f"{checkpoint.why}; bring back what is missing, or move or delete the folder"
    try:
        proof = completeness.prove(checkpoint.folder)
    except CheckpointError as error:
        require_read(error)
        return f"{checkpoint.why}; {error}; move or delete it if its save is over"
    if not proof.resumable:
        return f"{checkpoint.why}; weights only, by {proof.kind}"
    ways = "ckpt.find takes it" + (", --adopt commits it" if proof.tag is not None else "")
    return f"{checkpoint.why}; whole, by {proof.kind}: {ways}"


def _lost_latest(folder: Path, held: manifest.Manifest) -> dict[str, str]:
    """The files latest with a tag in them that are all that the manifest misses; else nothing."""
    wrong = [line.partition(":")[0] for line in manifest.check(folder, held, strict=True)]
    known = engines.pointers(str(held.tag), engines.names(held))
    for name in wrong:
        right = f"sha256:{sha256(known.get(name, '').encode()).hexdigest()}"
        if name not in known or held.files[name].digest != right:
            return {}
    return {name: known[name] for name in wrong}


def _rename(folder: Path, aside: Path) -> None:
    renaming.move(folder, aside)
    files.sync_folder(folder.parent)


def _doubles(checkpoints: Sequence[Checkpoint]) -> Iterator[Finding]:
    committed = [c for c in members(checkpoints) if not c.folder.is_symlink()]
    for step, group in groupby(committed, key=lambda c: c.step):
        names = [checkpoint.name for checkpoint in group]
        if len(names) > 1:
            what = f"and {', '.join(names[:-1])} are both of step {step}; delete or move one"
            yield Finding(committed[0].folder.with_name(names[-1]), what)


def _stray(folder: Path, checkpoint: Checkpoint | None = None) -> Iterator[Finding]:
    """Files under temporary names, which a write that was cut short left."""
    listed = checkpoint.manifest.files if checkpoint and checkpoint.manifest else {}
    for path in sorted(folder.rglob("*.partial") if checkpoint else folder.glob("*.partial")):
        name = path.relative_to(folder).as_posix()
        plain = path.is_file() and not path.is_symlink()
        if plain and name not in listed and time.time() - path.lstat().st_ctime >= QUIET:
            gone = partial(path.unlink, missing_ok=True)  # what is mended first may have used it
            yield Finding(path, "a write that was cut short", "remove it", gone)


def _leases(folder: Path) -> Iterator[Finding]:
    for path, record in lease_watch.leftovers(folder, QUIET):
        who = f", {record.holder}" if record.holder else ""
        what = f"the lease of a job that has ended{who}"
        yield Finding(path, what, "remove it", partial(lease_watch.remove, path, record))


def _pointers(run: Run, checkpoints: Sequence[Checkpoint]) -> Iterator[Finding]:
    wanted = leading(checkpoints)
    for name in POINTERS:
        path, text = run.path / name, run.target(name)
        expected = wanted if name == "latest" else _meant(run, text)
        if expected is None:
            yield from _dangling(run, name, text)
        elif name == "latest" and _names_newer_whole(run, text, expected):
            continue  # a resume takes it, too
        elif text != expected.pointer:
            what = _state(run, name, text, expected)
            yield Finding(
                path, what, f"name {expected.pointer}", partial(run.point, name, expected)
            )


def _names_newer_whole(run: Run, text: str | None, expected: Checkpoint) -> bool:
    """Whether ``latest`` names one of a later step that nobody committed, and that is whole."""
    checkpoint = run.pointer("latest") if text else None
    if checkpoint is None or checkpoint.manifest is not None or checkpoint.committed:
        return False
    if checkpoint.why != manifest.ABSENT or (checkpoint.step or 0) <= (expected.step or 0):
        return False
    try:
        return completeness.prove(checkpoint.folder).resumable
    except CheckpointError as error:
        require_read(error)
        return False


def _meant(run: Run, text: str | None) -> Checkpoint | None:
    """The committed checkpoint that a pointer means, even if its tag is gone."""
    folder = run.path / (text or "").partition("/")[0]
    if not text or not manifest.is_inside(text) or not folder.is_dir() or not is_checkpoint(folder):
        return None
    return next((c for c in run.checkpoints() if c.name == folder.name and c.committed), None)


def _dangling(run: Run, name: str, text: str | None) -> Iterator[Finding]:
    """A pointer that nothing committed fits. One written by DeepSpeed may still lead somewhere."""
    leads = bool(text) and manifest.is_inside(str(text)) and (run.path / str(text)).is_dir()
    if text is None or (leads and name == "latest"):
        return
    what = f"names {text!r}, which is no committed checkpoint"
    if name == "best":
        yield Finding(run.path / name, what, "remove it", partial(run.point, name, None))
    else:  # without the file DeepSpeed starts from scratch and says so in a warning only
        yield Finding(run.path / name, what)


def _state(run: Run, name: str, text: str | None, expected: Checkpoint) -> str:
    if text is None:
        return "is missing"
    if (found := run.pointer(name)) is None:
        return f"names {text!r}, which is not there"
    if found.name == expected.name:
        return f"names {text!r}, expected {expected.pointer}"
    return f"names {text!r}, which is {'older' if found.committed else 'not committed'}"
