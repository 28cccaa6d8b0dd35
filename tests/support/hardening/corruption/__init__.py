"""Damaged checkpoints: every damage is refused, or makes no difference to any byte of the output.

A damage that is taken in silence is a finding. ``every`` flips each byte of each structure.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt.weights.conversion import convert
from converters.errors import CheckpointError
from hardening.corruption import damage, records, subjects
from hardening.corruption.damage import Damage
from hardening.corruption.subjects import SUBJECTS, Subject
from hardening.notes import Notes, read

EVERY = "zero2-bf16-w2", "trainer-zero2", "zero3-bf16-w2"
UNVERIFIED = {"zero2-legacy"}  # no checksums on disk: the report counts bytes that nothing proves


class Patient:
    """A copy of a checkpoint that is damaged, converted and mended again and again."""

    def __init__(self, subject: Subject, work: Path):
        self.subject = subject
        self.folder = subject.copied(work)
        memory = Path("/dev/shm")  # where an fsync costs nothing
        self.scratch = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else work)
        self.output = Path(self.scratch.name) / "out"
        self.unverified = 0  # bytes of the last conversion that nothing proves
        self.notes: list[str] = []  # of the last conversion
        self.right = self.converted()

    def converted(self) -> dict[str, str]:
        """Digests of the output's files but its record; ``CheckpointError`` if there is none."""
        try:
            facts = convert.run(convert.prepare(self.folder, self.output), workers=1)
            self.unverified = facts["checks"]["no_crc32_bytes"]
            self.notes = facts["notes"]
            found = sorted(p for p in self.output.iterdir() if p.name != "conversion.json")
            return {path.name: sha256(path.read_bytes()).hexdigest() for path in found}
        finally:
            shutil.rmtree(self.output, ignore_errors=True)

    def answer(self, harm: Damage) -> str:
        """What comes of a damage: a kind of error, "irrelevant", or what is wrong."""
        undo = harm.make()
        try:
            found = self.converted()
        except CheckpointError as error:
            clean = "\n" not in str(error) and str(error).isprintable()
            return error.kind if clean else f"a message of several lines: {error}"
        except Exception as error:
            return f"{type(error).__name__}, a traceback: {str(error)[:200]}"
        finally:
            undo()
        if found == self.right:
            return "irrelevant"
        changed = [
            name for name in {*found, *self.right} if found.get(name) != self.right.get(name)
        ]
        # It is the user's text, copied, and has no checksum; it says which tied names are written.
        decided = {"config.json", "model.safetensors"}
        if harm.name.startswith("config.json") and {*changed} <= decided:
            return "irrelevant"
        if harm.name.startswith("config.json") and any("config.json" in n for n in self.notes):
            return "named"  # the weights are had without it
        if self.unverified and "byte" in harm.kind:
            return "unverified, and said so"  # the stream before zips has no checksums
        return f"taken in silence: {', '.join(changed)} differ"


def harms(patient: Patient, seed: int, most: int | None = None) -> Iterator[Damage]:
    """All damages of a checkpoint, or ``most`` of each kind a file."""
    yield from subjects.mixtures(patient.subject, patient.folder)
    for path in subjects.files(patient.folder):
        yield from damage.cuts(path, seed, most)
        yield from damage.flips(path, seed, most)


def finding(patient: Patient, harm: Damage, answer: str) -> str | None:
    """A line if the answer is not good enough."""
    if answer in (
        "corrupt",
        "incomplete",
        "refused",
        "unsupported",
        "unloadable",
        "irrelevant",
        "named",
    ):
        return None
    if answer.startswith("unverified") and patient.subject.name in UNVERIFIED:
        return None
    return f"{patient.subject.name}: {harm.kind}, {harm.name}: {answer}"


def run(seconds: float, seed: int, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Damages all subjects in turns; see ``scripts/harden.py``."""
    end = time.monotonic() + seconds
    answers: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    findings: list[str] = []
    patients = [Patient(subject, work) for subject in SUBJECTS]
    for round_ in itertools.count():
        for patient in patients:
            most = 4 if not round_ else 40
            for harm in _mixed(patient, seed + round_, most, first=not round_):
                if round_ and time.monotonic() > end:
                    break
                answer = patient.answer(harm)
                answers[answer if len(answer) < 30 else "finding"] += 1
                kinds[harm.kind] += 1
                if (line := finding(patient, harm, answer)) is not None:
                    findings.append(line)
                    say(line)
            say(f"{patient.subject.name}: {sum(answers.values())}, {len(findings)} findings")
        if time.monotonic() > end:
            break
    return {
        "damages": sum(answers.values()),
        "kinds": dict(kinds),
        "answers": dict(answers),
        "findings": findings,
    }


def _mixed(patient: Patient, seed: int, most: int, first: bool) -> list[Damage]:
    found = list(harms(patient, seed, most))
    if not first:  # the mixtures and the cuts are always the same
        found = [harm for harm in found if harm.kind.endswith("byte") or harm.kind == "cut"]
        random.Random(seed).shuffle(found)
    return found


def every(notes: Path, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Each byte of every structure of ``EVERY``, a bit and then all bits flipped; of a manifest,
    each bit. What ``notes`` has already is not done again."""
    answers: Counter[str] = Counter()
    findings: list[str] = []
    bytes_, of = 0, 0
    patients = [Patient(s, work) for name in EVERY for s in SUBJECTS if s.name == name]
    for whole, patient in itertools.product((False, True), patients):
        files = subjects.files(patient.folder)
        harms = [h for path in files for h in damage.each_byte(path, whole)]
        path = notes / f"{patient.subject.name}-{'byte' if whole else 'bit'}.jsonl"
        held = Notes(path, len(harms))
        for harm in harms if held.mine else ():
            if (harm.name,) not in held.done:
                answer = patient.answer(harm)
                wrong = finding(patient, harm, answer)
                held.add([harm.name], [wrong] if wrong else [])
                answers[answer if wrong is None else "finding"] += 1
        held.close()
        done = read(path, len(harms))
        findings += [line for wrong in done.values() for line in wrong]
        bytes_, of = bytes_ + len(done), of + len(harms)
        say(f"{path.stem}: {len(done)} of {len(harms)}, {len(findings)} findings")
    refused, same, wrong = records.each_bit()
    return {
        "flips": bytes_,
        "of": of,
        "answers of this run": dict(answers),
        "bits of a manifest": f"{refused} refused, {same} the same manifest",
        "findings": findings + wrong,
    }
