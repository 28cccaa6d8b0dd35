"""One rank of trainings by other front ends: ``places_fronts_worker.py OUT_DIR PART,PART``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hf_worker
import torch.distributed as dist
import trainers_worker_accelerate
import transformers as hf
from ending import leave
from faults import places
from places_worker import lack

from ckpt.runs.manifest import check
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run
from ckpt.saving import preflight
from ckpt.trainers.hf import CheckpointCallback
from converters.errors import CheckpointError
from converters.storage import local

LACKING = ("folder rename", "folder fsync", "map, lock, allocate, mode")
FORMS = ("class", "callback")
ONE = {"save_total_limit": 1, "eval_strategy": "no"}


def make(form: str, run: Path, stage: int, **options: Any) -> tuple[Any, hf_worker.Heard]:
    """A Trainer whose checkpoints are committed, in one of the two ways."""
    if form == "class":
        return hf_worker.make(hf_worker.Committed, run, stage, **options)
    callbacks = [CheckpointCallback(timeout=60)]
    return hf_worker.make(hf.Trainer, run, stage, callbacks=callbacks, **options)


def require_tidy(run: Path) -> None:
    """One whole checkpoint is left, and nothing that is hidden."""
    dist.barrier()
    hidden = [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert hidden == [], (run, hidden)
    (newest,) = Run(run).checkpoints()
    assert newest.committed and newest.manifest is not None, (run, newest.why)
    assert check(newest.folder, newest.manifest, data=True) == [], run
    dist.barrier()


def trainer(out: Path) -> None:
    """The Trainer's two forms, with rotation and a resume."""
    for name in LACKING:
        for form in FORMS:
            run = out / f"{form} {name}"
            lack(out, name)
            for steps in (1, 2):
                made, _ = make(form, run, 2, max_steps=steps, save_steps=1, **ONE)
                made.train(resume_from_checkpoint=steps > 1)
            require_tidy(run)


def accelerate(out: Path) -> None:
    """Accelerate's states, one over another of the same step."""
    for name in LACKING:
        lack(out, name)
        run = out / f"accelerate {name}"
        training = trainers_worker_accelerate.Training(run, 2)
        for _ in range(2):
            training.steps(1)
            for _ in range(2):
                saved = trainers_worker_accelerate.save_state(
                    training.accelerator, run, retention=Retention(last=1)
                )
                assert (saved / "manifest.json").is_file()
        require_tidy(run)


SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero3 without weights": (3, {"zero": {"stage3_gather_16bit_weights_on_model_save": False}}),
    "peft": (2, {"peft": True}),
    "save_only_model": (2, {"save_only_model": True}),
}


def sizes(out: Path) -> None:
    """What the Trainer's two forms predict at their start, and what a checkpoint takes.

    Then a disk that holds one checkpoint and a half: refused before the first step.
    """
    found, predicted, check_all = {}, [], preflight.check

    def noted(*args: Any, **options: Any) -> int:
        predicted.append(check_all(*args, **options))
        return predicted[-1]

    preflight.check = noted
    for name, (stage, more) in SIZES.items():
        for form in FORMS:
            run = out / f"size {form} {name}"
            made, _ = make(form, run, stage, max_steps=1, save_steps=1, hidden=256, **ONE, **more)
            made.train()
            dist.barrier()
            (saved,) = Run(run).checkpoints()
            found[f"{form} {name}"] = [predicted[-1], predicted[-1], saved.nbytes]
    preflight.check = check_all
    if not dist.get_rank():
        (out / "sizes.json").write_text(json.dumps(found))
    refused(out, int(1.5 * found["class zero2"][2]))


def refused(out: Path, free: int) -> None:
    """Both forms where ``free`` bytes are, and what they say."""
    said = {}
    free_space, local.free_space = local.free_space, lambda folder: free
    for form in FORMS:
        made, heard = make(form, out / f"room {form}", 2, hidden=256, **ONE)
        try:
            made.train()
        except CheckpointError as refusal:
            said[form] = str(refusal)
        assert heard.losses == [], form
    local.free_space = free_space
    if not dist.get_rank():
        (out / "room.json").write_text(json.dumps(said))


if __name__ == "__main__":
    places.wake_here()
    for part in sys.argv[2].split(","):
        globals()[part](Path(sys.argv[1]))
    dist.barrier()
    leave()
