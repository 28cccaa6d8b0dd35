"""Damaged and mixed checkpoints: refused, or provably without effect on the output."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from hardening.corruption import Patient, damage, finding, harms, subjects
from hardening.corruption.subjects import SUBJECTS
from oracles import FIXTURES
from run_folders import real

from ckpt.runs import manifest
from converters.errors import CheckpointError

BRIEF = ("zero0-bf16", "zero1-fp16-w2", "zero2-bf16-w2", "zero2-legacy", "zero3-bf16-w2")
PARALLEL = (
    *("parallel/tp_fusedb_z3_w4", "parallel/mics_hier_w4", "parallel/aeptp_mixtral_z2_w4"),
    *("pipelines-and-experts/pipeline-zero1", "pipelines-and-experts/autoep-zero3"),
)
OPTIMIZER = "global_step2/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if s.name in BRIEF or s.root != "."], ids=lambda s: s.name
)
def test_no_damage_is_taken_in_silence(subject: subjects.Subject, tmp_path: Path) -> None:
    patient = Patient(subject, tmp_path)
    kinds = set()
    for harm in harms(patient, seed=5, most=3):
        answer = patient.answer(harm)
        assert finding(patient, harm, answer) is None, finding(patient, harm, answer)
        kinds.add(harm.kind)
    assert {"cut", "header byte", "data byte"} <= kinds
    assert patient.converted() == patient.right


@pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if s.name in PARALLEL], ids=lambda s: s.name
)
def test_no_damage_of_more_parallelism_is_taken_in_silence(
    subject: subjects.Subject, tmp_path: Path
) -> None:
    patient = Patient(subject, tmp_path)
    for harm in harms(patient, seed=5, most=1):
        answer = patient.answer(harm)
        assert finding(patient, harm, answer) is None, finding(patient, harm, answer)


def test_files_under_each_others_names_are_told_by_the_name_they_were_saved_under(
    tmp_path: Path,
) -> None:
    patient = Patient(next(s for s in SUBJECTS if s.name == "zero3-bf16-w2"), tmp_path)
    one, other = (patient.folder / OPTIMIZER.format(rank) for rank in (0, 1))
    undo = damage.swapped(one, other).make()
    with pytest.raises(CheckpointError, match="was saved as bf16_zero_pp_rank_1_mp_rank_00_optim"):
        patient.converted()
    undo()
    shutil.copyfile(one, other)
    with pytest.raises(CheckpointError, match="the file of another rank or kind"):
        patient.converted()


def another_runs_file(path: Path) -> None:
    """Writes the rank's file as another run would have at the same step and rates."""
    state = torch.load(path, weights_only=False)
    for group in state["optimizer_state_dict"]["fp32_flat_groups"]:
        group.data += 0.25
    torch.save(state, path)


def test_the_known_limit_a_stage_3_rank_of_another_run_is_told_by_gathered_weights(
    tmp_path: Path,
) -> None:
    """Without them, and without a manifest, nothing on disk tells: docs/security.md says so."""
    bare = Patient(next(s for s in SUBJECTS if s.name == "zero3-bf16-w2"), tmp_path)
    another_runs_file(bare.folder / OPTIMIZER.format(1))
    assert bare.converted() != bare.right
    trained = Patient(next(s for s in SUBJECTS if s.name == "trainer-zero3"), tmp_path)
    another_runs_file(next(trained.folder.rglob("*rank_1_*optim_states.pt")))
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds other values"):
        trained.converted()


def test_a_committed_checkpoint_tells_every_damage_that_matters(tmp_path: Path) -> None:
    folder = real(tmp_path, 2).folder
    held = manifest.read(folder)
    subject = next(s for s in SUBJECTS if s.name == "trainer-zero2")
    patient = Patient(subject, tmp_path / "patient")
    names = [path.relative_to(patient.folder) for path in subjects.files(patient.folder)]
    found = 0
    rng = random.Random(3)
    for name in names:
        path = folder / name
        changes = [*damage.cuts(path, 1, 2), *damage.flips(path, 2, 6)]
        for harm in rng.sample(changes, min(10, len(changes))):
            undo = harm.make()
            if manifest.check(folder, held, data=True):
                found += 1
            else:  # a byte between two records of a zip, which no reader looks at
                copied = (patient.folder / name).read_bytes()
                (patient.folder / name).write_bytes(path.read_bytes())
                assert patient.converted() == patient.right, harm
                (patient.folder / name).write_bytes(copied)
            undo()
    assert found > 5 * len(names)
    assert manifest.check(folder, held, data=True) == []


def test_a_committed_stage_3_rank_of_another_run_is_found_by_its_digest(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "zero3-bf16-w2", tmp_path / "run")
    name = OPTIMIZER.format(1)
    path = tmp_path / "run" / name
    digest = manifest.digest(path)
    another_runs_file(path)
    after = manifest.digest(path)
    assert after.size == digest.size and after != digest


def test_every_name_in_the_list_of_subjects_is_a_fixture() -> None:
    for subject in SUBJECTS:
        for name in (subject.name, subject.twin, subject.larger):
            assert name is None or (FIXTURES / name / subject.root).is_dir() or name != subject.name
