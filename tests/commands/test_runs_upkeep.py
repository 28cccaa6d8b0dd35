"""doctor, adopt, slim and collect: what they find, prove and mend, and what they leave alone."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import peft_models
import pytest
import torch
import zero_folders
from faults import faults
from faults.forks import Forks
from oracles import FIXTURES, run
from run_folders import SOURCE, commit, listed, real
from safetensors.torch import load_file, save_file
from stock_checkpoints import stock

import ckpt
from ckpt.folders import filenames, locks
from ckpt.hub import wholeness
from ckpt.runs import manifest, pruning
from ckpt.runs.foreign.proofs import Proof
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.states import status
from ckpt.runs.upkeep import adoption, collect, doctor, findings, slim
from converters.errors import CheckpointError
from converters.zero import checkpoint as zero

Later = Callable[[], None]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """From its call on, what was written counts as written long ago."""
    return lambda: monkeypatch.setattr(findings, "QUIET", 0.0)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def found(run: Run) -> dict[str, str]:
    return {
        f.path.relative_to(run.path).as_posix(): f.remedy or ""
        for f in doctor.diagnose(run).findings
    }


@pytest.fixture
def out(tmp_path: Path) -> Run:
    """A run with two committed checkpoints and right pointers."""
    made = Run(tmp_path / "out")
    for step in (2, 4):
        real(made.path, step)
    made.point("latest", made.newest())
    return made


def test_a_healthy_run_has_nothing_to_mend(out: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(out.path)
    run("doctor", out.path)
    run("doctor", out.path, "--fix")
    assert tree(out.path) == before


@pytest.mark.parametrize(
    "text",
    [None, "", "checkpoint-9/global_step9", "checkpoint-4/gone", "checkpoint-2/global_step2"],
)
def test_a_wrong_latest_is_found_and_mended(text: str | None, out: Run) -> None:
    (out.path / "latest").unlink()
    if text is not None:
        (out.path / "latest").write_text(text)
    before = tree(out.path)
    run("doctor", out.path, code=1)
    assert tree(out.path) == before
    run("doctor", out.path, "--fix")
    assert (out.path / "latest").read_text() == "checkpoint-4/global_step2"
    assert zero.read(out.path).world_size == 2


def test_a_best_that_names_nothing_is_removed_and_one_without_its_tag_renamed(out: Run) -> None:
    (out.path / "best").write_text("checkpoint-3/global_step3")
    run("doctor", out.path, "--fix")
    assert not (out.path / "best").exists()
    (out.path / "best").write_text("checkpoint-2/global_step9")
    run("doctor", out.path, "--fix")
    assert (out.path / "best").read_text() == "checkpoint-2/global_step2"


def test_a_latest_without_anything_committed_is_left_to_the_user(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step9")
    run("doctor", tmp_path, "--fix", code=1)
    assert (tmp_path / "latest").read_text() == "global_step9"


@pytest.mark.parametrize("state", ["missing", "wrong", "short"])
def test_the_latest_inside_a_checkpoint_is_mended(state: str, out: Run, later: Later) -> None:
    inner = out.path / "checkpoint-4/latest"
    inner.unlink()
    if state == "wrong":
        inner.write_text("global_step9")
    if state == "short":
        inner.write_text("global")
    later()
    run("doctor", out.path, "--fix")
    assert inner.read_text() == "global_step2"
    newest = out.newest()
    assert newest and newest.step == 4 and zero.read(newest.folder).step == 2


def test_leftovers_nobody_works_on_are_removed(out: Run, later: Later) -> None:
    for name in (".checkpoint-6.saving", ".checkpoint-1.trash", ".checkpoint-4-fp32.partial"):
        (out.path / name / "global_step6").mkdir(parents=True)
    (out.path / ".checkpoint-6.saving/.lock").touch()
    (out.path / ".checkpoint-4-fp32.partial/plan.json").touch()
    (out.path / "latest.partial").touch()
    (out.path / "checkpoint-4/model.safetensors.partial").touch()
    (out.path / ".cache").mkdir()
    later()
    run("doctor", out.path, code=1)
    run("doctor", out.path, "--fix")
    kept = [".cache", "checkpoint-2", "checkpoint-4", "latest"]
    assert sorted(os.listdir(out.path)) == kept
    assert not (out.path / "checkpoint-4/model.safetensors.partial").exists()


@pytest.mark.parametrize(
    ("name", "lock"), [(".checkpoint-6.saving", ".lock"), (".m-fp32.partial", "plan.json")]
)
def test_work_that_goes_on_is_not_harmed(name: str, lock: str, out: Run, later: Later) -> None:
    (out.path / name).mkdir()
    later()
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    script += "print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(out.path / name / lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        run("doctor", out.path, "--fix")
        assert (out.path / name / lock).exists()
        process.kill()
    run("doctor", out.path, "--fix")
    assert not (out.path / name).exists()


def test_a_staging_folder_without_a_lock_is_left_while_it_changes(out: Run, later: Later) -> None:
    folder = out.path / ".checkpoint-6.saving"
    folder.mkdir()
    assert found(out) == {}
    later()
    assert found(out) == {folder.name: "remove it"}


def test_a_torn_folder_is_set_aside_and_never_deleted(out: Run, later: Later) -> None:
    torn = out.path / "checkpoint-6"
    shutil.copytree(SOURCE, torn)
    cut = torn / "global_step2/mp_rank_00_model_states.pt"
    cut.write_bytes(cut.read_bytes()[:5000])
    assert found(out) == {"checkpoint-6": ""}  # it changed just now: a Trainer may be at it
    later()
    before = tree(torn)
    run("doctor", out.path, "--fix")
    assert tree(out.path / ".checkpoint-6.torn") == before
    assert [c.step for c in out.checkpoints()] == [2, 4]


def test_a_damaged_committed_folder_is_set_aside_and_latest_moves_back(
    out: Run, later: Later
) -> None:
    (out.path / "checkpoint-4/global_step2/mp_rank_00_model_states.pt").unlink()
    later()
    run("doctor", out.path, "--fix")
    assert (out.path / "latest").read_text() == "checkpoint-2/global_step2"
    assert (out.path / ".checkpoint-4.torn").is_dir()


@pytest.mark.parametrize(("kept", "code"), [("model.safetensors", 0), ("pytorch_model.bin", 1)])
def test_a_trainers_folder_without_deepspeed_is_not_torn(
    kept: str, code: int, out: Run, later: Later
) -> None:
    folder = out.path / "checkpoint-6"
    folder.mkdir()
    shutil.copy(SOURCE / "model.safetensors", folder / kept)
    shutil.copy(SOURCE / "trainer_state.json", folder)
    later()
    run("doctor", out.path, "--fix", code=code)  # complete weights, or no file of torch
    assert folder.is_dir()


def test_folders_of_other_trainers_are_never_renamed(tmp_path: Path, later: Later) -> None:
    for step, name in ((1, "__0_0.distcp"), (2, "optimizer.pt"), (3, "weights.npz")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / name).write_bytes(b"of another trainer")
    later()
    before = tree(tmp_path)
    run("doctor", tmp_path, "--fix", code=1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("node", ["n0", "n1"])
def test_a_nodes_part_of_a_checkpoint_is_not_torn(node: str, out: Run, later: Later) -> None:
    folder = out.path / "checkpoint-6"
    shutil.copytree(FIXTURES / "corpus/nl2" / node, folder)
    later()
    run("doctor", out.path, "--fix", code=1)
    assert folder.is_dir()


@pytest.mark.parametrize("text", [None, "", "global_step9"])
def test_a_whole_checkpoint_that_lacks_only_its_latest_gets_it(
    text: str | None, tmp_path: Path, later: Later
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    (folder / "latest").unlink()
    if text is not None:
        (folder / "latest").write_text(text)  # empty: what a power loss leaves
    later()
    run("doctor", tmp_path, code=1)
    run("doctor", tmp_path, "--fix")
    assert (folder / "latest").read_text() == "global_step2"
    run("doctor", tmp_path, "--adopt")
    run("doctor", tmp_path, "--fix")
    assert (tmp_path / "latest").read_text() == "checkpoint-2/global_step2"


def test_folders_of_kinds_that_are_not_read_here_are_not_torn(out: Run, later: Later) -> None:
    for number, name in enumerate(("pp_z1bf", "moe_s2"), 6):
        folder = out.path / f"checkpoint-{number}"
        shutil.copytree(FIXTURES / "corpus" / name, folder)
    later()
    run("doctor", out.path, "--fix")
    assert {c.name for c in out.checkpoints()} >= {"checkpoint-6", "checkpoint-7"}


def test_two_folders_of_one_step_are_told(out: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(out.path / "checkpoint-4", out.path / "again")
    run("doctor", out.path, "--json", code=1)
    facts = json.loads(capsys.readouterr().out)["findings"]
    assert [f["problem"] for f in facts if f["remedy"] is None] == [
        "and again are both of step 4; delete or move one"
    ]


def test_lightnings_last_beside_the_one_of_its_step_is_nothing_to_mend(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name in ("epoch=0-step=4.ckpt", "last.ckpt"):
        real(tmp_path, 4).folder.rename(tmp_path / name)
    assert len(run.checkpoints()) == 2
    assert not [path for path in found(run) if path.endswith(".ckpt")]


def test_a_run_of_deepspeed_itself_is_left_alone(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path / "out")
    before = tree(tmp_path / "out")
    run("doctor", tmp_path / "out", "--fix")
    assert tree(tmp_path / "out") == before


def test_a_whole_checkpoint_of_a_trainer_is_adopted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Run(tmp_path)
    for name in ("trainer-zero2", "trainer-zero3"):
        shutil.copytree(FIXTURES / name / "checkpoint-2", tmp_path / name)
    run("doctor", tmp_path, "--adopt")  # at once: they do not change any more
    for checkpoint in out.checkpoints():
        held = checkpoint.manifest
        assert held and checkpoint.committed and (held.step, held.tag) == (2, "global_step2")
        assert held.versions["deepspeed"] == "0.19.8" and held.world_size == 2
    run("verify", tmp_path, "--data")
    assert not (tmp_path / "latest").exists()  # adopting implies nothing else
    assert f"ckpt doctor {tmp_path} --fix writes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "null", '{"format": 1}', '{"version": 99}', "{", "", "\xff", "[" * 99_999, "EDIT"],
)
def test_a_damaged_manifest_is_replaced_by_adoption(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    run("doctor", tmp_path, "--adopt")
    good = manifest.read(folder)
    path = folder / filenames.MANIFEST
    edited = path.read_text().replace('"step": 2', '"step": 3')
    path.write_bytes((edited if content == "EDIT" else content).encode("latin-1"))
    with pytest.raises(CheckpointError, match="--adopt") as damage:
        manifest.read(folder)
    assert "Expecting" not in str(damage.value) and "codec" not in str(damage.value)

    run("doctor", tmp_path, "--adopt", "--dry-run")
    run("doctor", tmp_path, "--adopt")
    assert manifest.read(folder).files == good.files
    run("verify", tmp_path, "--data")


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("rng_state_1.pth", None),
        ("rng_state_1.pth", 7968),
        ("trainer_state.json", None),
        ("trainer_state.json", 300),
        ("model.safetensors", 9000),
        ("scheduler.pt", 700),
        ("config.json", 100),
        ("latest", 0),
        ("global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", None),
        ("global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", 20000),
    ],
)
def test_a_torn_checkpoint_is_never_adopted(
    name: str, cut: int | None, tmp_path: Path, later: Later
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if cut is not None:
        (folder / name).write_bytes(data[:cut])
    later()
    before = tree(tmp_path)
    run("doctor", tmp_path, "--adopt", code=1)
    assert tree(tmp_path) == before


def test_zeroed_pages_are_found_before_adoption(tmp_path: Path, later: Later) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    path = folder / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    at = info.header_offset + 400  # as a power loss leaves a file that was never synced
    data[at : at + 512] = bytes(512)
    path.write_bytes(data)
    zero.read(folder)  # nothing in the headers gives it away
    later()
    with pytest.raises(CheckpointError, match="CRC32"):
        adoption.commit(folder)


def test_one_that_changes_is_not_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    proven, digest = status.prove, manifest.digest

    def prove(path: Path, **_: Any) -> Any:
        (folder / "rng_state_2.pth").write_bytes(b"a rank that is late")
        return Proof(path, "x", 2, "global_step2", shapes={})

    monkeypatch.setattr(status, "prove", prove)
    run("doctor", tmp_path, "--adopt", code=1)
    assert "is being written right now" in capsys.readouterr().out

    def late_digest(path: Path, progress: Any) -> Any:
        (folder / "late.json").write_text("{}")
        return digest(path, progress)

    (folder / "rng_state_2.pth").unlink()
    monkeypatch.setattr(status, "prove", proven)
    monkeypatch.setattr(manifest, "digest", late_digest)
    run("doctor", tmp_path, "--adopt", code=1)
    assert "it changed while it was read" in capsys.readouterr().out
    assert not open_checkpoint(folder).committed


def test_what_was_deleted_by_hand_is_taken_off_the_manifest(
    out: Run, later: Later, capsys: pytest.CaptureFixture[str]
) -> None:
    two, four = (checkpoint.folder for checkpoint in out.checkpoints())
    (four / "model.safetensors").unlink()
    shutil.rmtree(two / "global_step2")
    later()
    run("ls", out.path)
    said = capsys.readouterr().out
    assert "lacks model.safetensors" in said and "global_step2/" in said
    run("verify", four, code=1)
    assert "model.safetensors: missing" in capsys.readouterr().out
    run("doctor", out.path, code=1)
    said = capsys.readouterr().out
    assert "model.safetensors, which was deleted: resumable, its weights were deleted" in said
    assert "which was deleted: weights only" in said
    run("doctor", out.path, "--fix")
    first, second = out.checkpoints()
    assert (first.tier, first.why, first.deleted) == ("weights", None, ())
    assert (second.tier, second.why, second.deleted) == ("full", None, ())
    run("verify", out.path, "--data")
    assert found(out) == {}


def test_states_that_are_brought_back_are_not_deleted(
    out: Run, later: Later, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = out.checkpoints()[0].folder
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    shutil.move(folder / "global_step2", tmp_path / "elsewhere")
    later()
    run("doctor", out.path, "--fix")
    shutil.move(tmp_path / "elsewhere", folder / "global_step2")
    later()
    run("doctor", out.path, "--fix", code=1)
    said = capsys.readouterr().out
    assert f"if all are back, delete manifest.json: ckpt doctor {folder} --adopt then" in said
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before

    (folder / "manifest.json").unlink()
    run("doctor", folder, "--adopt", "--now")
    assert open_checkpoint(folder).committed and open_checkpoint(folder).tier == "full"
    for path in folder.glob("*/*optim_states.pt"):
        path.unlink()
    later()
    run("doctor", out.path, "--fix")
    assert open_checkpoint(folder).committed and open_checkpoint(folder).tier == "weights"


def test_where_all_was_torn_no_command_names_what_was_set_aside(
    tmp_path: Path,
    later: Later,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(SOURCE, tmp_path / "checkpoint-2")
    next(folder.glob("*/*optim_states.pt")).unlink()
    later()
    run("doctor", tmp_path, "--fix")
    for command, code in (("ls", 0), ("doctor", 0), ("latest", 1), ("verify", 1)):
        capsys.readouterr()
        run(command, tmp_path, code=code)
        printed = capsys.readouterr().err
        assert "no checkpoint but .checkpoint-2.torn, which ckpt doctor --fix renamed" in printed
        assert "name this folder" not in printed
    assert ckpt.find(tmp_path) is None and "renamed as torn" in caplog.text


@pytest.mark.parametrize("is_stock", [True, False])
def test_a_latest_whose_checkpoint_a_rotation_deleted_gets_a_way_that_leads(
    is_stock: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_stock:
        stock(tmp_path, 8)
    else:
        shutil.copytree(FIXTURES / "zero2-bf16-w2/global_step2", tmp_path / "step_8")
    (tmp_path / "latest").write_text("checkpoint-6/global_step6")
    run("doctor", tmp_path, code=1)
    printed = capsys.readouterr().out
    if not is_stock:
        assert "; make it name step_8" in printed
        return
    assert f"ckpt doctor {tmp_path} --adopt commits what is complete, and ckpt doctor" in printed
    run("doctor", tmp_path, "--adopt", "--now")
    run("doctor", tmp_path, "--fix")
    assert (tmp_path / "latest").read_text() == "checkpoint-8/global_step2"
    run("doctor", tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_a_file_that_fix_does_not_record_is_deleted_first_as_verify_says(
    name: str, out: Run, later: Later, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = out.checkpoints()[-1].folder
    data = bytearray((newest / name).read_bytes())
    data[-5] ^= 1
    (newest / name).write_bytes(data)
    is_weights = name == "model.safetensors"
    seconds = (newest / "manifest.json").stat().st_mtime + (5 if is_weights else -5)
    os.utime(newest / name, (seconds, seconds))  # weights of another step, or a copy that is older
    later()
    run("doctor", out.path, "--fix")
    run("verify", newest, "--data", code=1)
    printed = capsys.readouterr().out
    command = f"ckpt doctor {out.path} --fix"
    assert f"needs {name}; bring it back, or delete it, after which {command} takes it" in printed
    assert "no resume needs what was changed" not in printed

    (newest / name).unlink()
    later()
    run("doctor", out.path, "--fix")
    run("verify", newest, "--data")


@pytest.mark.parametrize("is_longer", [True, False])
def test_an_edited_tokenizer_does_not_unmake_a_checkpoint(
    is_longer: bool, out: Run, later: Later, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = out.checkpoints()[-1].folder
    edited = newest / "tokenizer_config.json"
    text = edited.read_text()
    edited.write_text(f"{text}\n" if is_longer else text.replace("t", "T"))
    after_the_manifest = (newest / "manifest.json").stat().st_mtime + 5
    os.utime(edited, (after_the_manifest, after_the_manifest))
    later()
    run("latest", out.path)
    assert capsys.readouterr().out.strip() == str(newest)
    assert ckpt.find(out.path) == str(newest)
    run("verify", newest, "--data", code=1)
    assert f"no resume needs what was changed; ckpt doctor {out.path} --fix" in (
        capsys.readouterr().out
    )
    run("doctor", out.path, code=1)
    assert "lists tokenizer_config.json, which was changed by hand" in capsys.readouterr().out
    run("doctor", out.path, "--fix")
    assert found(out) == {}
    run("verify", out.path, "--data")


def test_changed_weights_are_recorded_only_if_they_are_whole(out: Run, later: Later) -> None:
    newest = out.checkpoints()[-1].folder
    weights = newest / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    later()
    assert open_checkpoint(newest).committed
    run("doctor", out.path, "--fix", code=1)
    assert found(out) == {"checkpoint-4/model.safetensors": ""}
    states = next((newest / "global_step2").glob("*optim_states.pt"))
    os.truncate(states, states.stat().st_size - 100)
    assert not open_checkpoint(newest).committed


def test_what_was_thinned_by_hand_is_rotated_as_if_it_were_whole(tmp_path: Path) -> None:
    out = Run(tmp_path)
    for step in (2, 4, 6, 8, 10):
        real(tmp_path, step)
    for step in (2, 4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}/global_step2")
    (tmp_path / "checkpoint-8/model.safetensors").unlink()
    pruning.pin(out.checkpoints()[0], True)
    torn = tmp_path / "checkpoint-3"
    shutil.copytree(SOURCE, torn)  # nobody committed it
    outcomes = pruning.prune(out, Retention(last=3), dry_run=True)
    assert [o.kept for o in outcomes] == [True, False, True, True, True]
    pruning.prune(out, Retention(last=3))
    assert [c.step for c in out.checkpoints()] == [2, 3, 6, 8, 10]
    pruning.prune(out, Retention(last=1))
    assert [c.step for c in out.checkpoints()] == [2, 3, 10]


def test_slim_keeps_the_weights_and_says_what_goes(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = out.path / "checkpoint-2"
    before = tree(folder)
    run("slim", folder, "--dry-run", "--json")
    told = json.loads(capsys.readouterr().out)
    assert tree(folder) == before
    run("slim", folder)
    after = tree(folder)
    gone = {name for name in before if name not in after} - {"global_step2"}
    assert gone == set(told["deleted"])
    assert told["bytes"] == sum(len(before[name] or b"") for name in gone)
    assert sorted(after) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "training_args.bin",
    ]
    assert all(after[name] == before[name] for name in after if name != "manifest.json")
    slimmed = open_checkpoint(folder)
    assert slimmed.committed and slimmed.tier == "weights"
    run("verify", folder, "--data")
    run("slim", folder)
    assert found(out) == {}


def test_the_doctor_finishes_a_slim_down_to_the_last_empty_folder(out: Run) -> None:
    run("slim", out.path / "checkpoint-2")
    done = set(tree(out.path))
    (out.path / "checkpoint-2/.global_step2.trash/empty").mkdir(parents=True)
    assert found(out) == {"checkpoint-2": "remove them"}
    run("doctor", out.path, "--fix")
    assert set(tree(out.path)) == done


def test_slim_moves_the_pointers_that_named_the_tag(out: Run) -> None:
    out.point("best", out.find("2"))
    run("slim", out.path / "checkpoint-2")
    assert (out.path / "best").read_text() == "checkpoint-2"
    run("slim", out.path / "checkpoint-4", "--force")
    assert (out.path / "latest").read_text() == "checkpoint-4"


def test_slim_refuses_the_newest_the_pinned_and_what_is_read(out: Run) -> None:
    before = tree(out.path)
    run("slim", out.path / "checkpoint-4", code=1)
    with locks.reading(out.path / "checkpoint-2"):
        run("slim", out.path / "checkpoint-2", code=1)
    assert tree(out.path) == before
    pruning.pin(out.find("2"), True)
    run("slim", out.path / "checkpoint-2", code=1)
    assert (out.path / "checkpoint-2/global_step2").is_dir()


@pytest.mark.parametrize(
    "damage", ["none", "missing", "shape", "bytes", "unlisted", "empty", "alias"]
)
def test_slim_removes_nothing_unless_the_weights_are_complete(damage: str, out: Run) -> None:
    folder = out.path / "checkpoint-2"
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if damage in ("missing", "shape", "empty"):
        name = "model.norm.weight"
        tensors |= {name: torch.zeros(3 if damage == "shape" else 0, dtype=torch.bfloat16)}
        if damage == "missing":
            del tensors[name]
        save_file(tensors, path)
        commit(folder, 2)
    elif damage == "alias":  # tied: only the other name is there
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight", None)  # type: ignore
        save_file({k: v for k, v in tensors.items() if v is not None}, path)
        commit(folder, 2)
    elif damage == "bytes":
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    elif damage == "unlisted":
        held = manifest.read(folder)
        files = {n: f for n, f in held.files.items() if n != "model.safetensors"}
        (folder / filenames.MANIFEST).write_bytes(replace(held, files=files).dumps())
    else:
        path.unlink()
        commit(folder, 2)
    before = tree(out.path)
    if damage == "alias":
        run("slim", folder)
        return
    with pytest.raises(CheckpointError, match="nothing was removed"):
        slim.plan(open_checkpoint(folder))
    assert tree(out.path) == before


def test_slim_of_a_save_dir_names_ways_that_lead_somewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "epoch1"
    shutil.copytree(FIXTURES / "zero2-bf16-w2", folder)
    run("slim", folder, code=1)
    command = f"ckpt doctor {tmp_path} --adopt"
    said = capsys.readouterr().err
    assert f"{command} commits it, else make the weights with ckpt to-fp32 {folder}" in said
    run("latest", tmp_path)
    assert command in capsys.readouterr().err
    run("doctor", tmp_path, "--adopt")
    assert open_checkpoint(folder).committed


def test_slim_removes_nothing_through_a_link(out: Run, tmp_path: Path) -> None:
    folder, elsewhere = out.path / "checkpoint-2", tmp_path / "elsewhere"
    shutil.move(folder / "global_step2", elsewhere)
    (folder / "global_step2").symlink_to(elsewhere)
    before = tree(tmp_path)
    run("slim", folder, code=1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["dora", "saved-modules", "embedding", "p-tuning", "ia3"])
def test_slim_of_an_adapter_keeps_the_adapter(kind: str, tmp_path: Path) -> None:
    out, folder = Run(tmp_path), tmp_path / "checkpoint-2"
    model = peft_models.model(kind)
    zero_folders.save(model, folder, exclude_frozen=True)
    peft_models.saved(model, folder)
    commit(folder, 2)
    real(tmp_path, 4)

    made = slim.plan(out.find("2"))
    assert "all of the adapter" in made.proven[0]
    slim.execute(made)

    assert out.find("2").tier == "weights"
    assert not (folder / zero_folders.TAG).exists()


def test_slim_keeps_the_states_of_an_adapter_that_is_not_whole(tmp_path: Path) -> None:
    out, folder = Run(tmp_path), tmp_path / "checkpoint-2"
    model = peft_models.model("saved-modules")
    zero_folders.save(model, folder, exclude_frozen=True)
    path = peft_models.saved(model, folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    real(tmp_path, 4)
    for name in ("base_model.model.lm_head.weight", next(n for n in tensors if "lora_B" in n)):
        save_file({n: tensor for n, tensor in tensors.items() if n != name}, path)
        commit(folder, 2)
        with pytest.raises(CheckpointError, match=r"not complete: .* is missing"):
            slim.plan(out.find("2"))


@pytest.mark.hardening
def test_slim_killed_at_any_operation_leaves_a_committed_checkpoint(
    forks: Forks, tmp_path: Path
) -> None:
    out, log, folder = tmp_path / "out", tmp_path / "log", tmp_path / "out/checkpoint-2"
    model = tmp_path / "model"
    for step in (2, 4):
        real(model, step)
    Run(model).point("best", Run(model).find("2"))

    def start(at: int) -> int:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(model, out)
        return forks.run(["slim", folder], out, at=at, log=log).status

    assert start(0) == 0
    wanted, count = set(tree(out)), len(faults.journal(log))
    assert count > 10
    tiers = []
    for at in range(1, count + 1):
        assert start(at) == -signal.SIGKILL
        state = open_checkpoint(folder)
        assert state.committed, (at, state.why)
        tiers.append(state.tier)
        if state.tier == "full":
            zero.read(folder)
        # the same command, or the doctor, finishes
        if state.tier == "weights":
            doctor.mend(Run(out))
            assert not slim.leftovers(open_checkpoint(folder)), at
        run("slim", folder)
        assert set(tree(out)) - {"latest"} == wanted, at
        assert (out / "best").read_text() == "checkpoint-2"
    assert set(tiers) == {"full", "weights"} and tiers == sorted(tiers)


def nodes(folder: Path, same: bool = True) -> list[Path]:
    """A checkpoint of two nodes, a rank each, as ``use_node_local_storage`` leaves it."""
    save, parts = uuid4().hex, []
    for node in range(2):
        part = folder / f"node{node}/checkpoint-2"
        shutil.copytree(SOURCE, part)
        other = 1 - node
        (part / f"global_step2/bf16_zero_pp_rank_{other}_mp_rank_00_optim_states.pt").unlink()
        (part / f"rng_state_{other}.pth").unlink()
        if node:
            (part / "latest").unlink()
            (part / "global_step2/mp_rank_00_model_states.pt").unlink()
            if not same:
                (part / "config.json").write_text("{}")
        commit(part, 2, node=node, nodes=2, save=save)
        parts.append(part)
    return parts


def test_parts_of_nodes_become_one_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = nodes(tmp_path)
    whole = tmp_path / "out/checkpoint-2"
    run("collect", *parts[::-1], "-o", whole, "--dry-run")
    assert not whole.parent.exists()
    run("collect", *parts[::-1], "-o", whole)
    made = {n: d for n, d in tree(whole).items() if n != "manifest.json"}
    assert made == tree(SOURCE)
    held = manifest.read(whole)
    assert (held.node, held.nodes, held.files) == (0, 1, listed(SOURCE))
    run("verify", whole, "--data")
    assert os.listdir(whole.parent) == ["checkpoint-2"]


@pytest.mark.parametrize("node", [0, 1])
def test_parts_are_joined_in_place(node: int, tmp_path: Path) -> None:
    parts = nodes(tmp_path)
    run("collect", *parts, "-o", parts[node])
    made = {n: d for n, d in tree(parts[node]).items() if n != "manifest.json"}
    assert made == tree(SOURCE)
    run("verify", parts[node], "--data")
    run("verify", parts[1 - node])


def test_a_part_of_a_node_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = nodes(tmp_path)[0]
    for command, path in (("ls", part.parent), ("verify", part), ("show", part), ("to-fp32", part)):
        run(command, path, code=command in ("show", "to-fp32"))
        printed = capsys.readouterr()
        assert "the part of node 0 of 2; ckpt collect joins them" in printed.out + printed.err

    (part / "manifest.json").unlink()  # and one that DeepSpeed saved so
    for path in (part / "global_step2").iterdir():
        state = torch.load(path, weights_only=False)
        state["ds_config"]["checkpoint"] = {"use_node_local_storage": True}
        torch.save(state, path)
    for command, code in (("ls", 0), ("verify", 1), ("doctor", 1), ("latest", 1)):
        run(command, part.parent, code=code)
        printed = capsys.readouterr()
        assert "the other nodes have the rest" in printed.out + printed.err, command


def test_what_is_no_whole_save_is_not_collected(tmp_path: Path) -> None:
    first, second = nodes(tmp_path)
    other = nodes(tmp_path / "other")[1]
    unlike = nodes(tmp_path / "unlike", same=False)
    before = tree(tmp_path)
    for parts, said in (
        ([first], "node 1 is missing"),
        ([first, first], "node 1 is missing"),
        ([first, second, second], "node 1 is there twice"),
        ([first, other], "of another save"),
        (unlike, "config.json is not the file"),
        ([first, tmp_path], "holds no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=said) as error:
            collect.plan(parts, tmp_path / "out/checkpoint-2")
        assert error.value.kind in ("incomplete", "refused")
    with pytest.raises(CheckpointError, match="exists already"):
        collect.plan([first, second], tmp_path / "other")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("inside", [False, True])
def test_a_damaged_part_is_not_collected(inside: bool, tmp_path: Path) -> None:
    parts = nodes(tmp_path)
    path = parts[1] / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    output = parts[0] if inside else tmp_path / "out"
    before = manifest.read(parts[0])
    run("collect", *parts, "-o", output, code=1)
    assert manifest.read(parts[0]) == before and open_checkpoint(parts[0]).committed
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    assert not (parts[0] / path.relative_to(parts[1])).exists()


@pytest.mark.hardening
def test_collect_killed_at_any_operation_leaves_a_part_or_the_whole(
    forks: Forks, tmp_path: Path
) -> None:
    base, log = tmp_path / "base", tmp_path / "log"

    def start(at: int) -> tuple[int, list[Path]]:
        shutil.rmtree(base, ignore_errors=True)
        parts = nodes(base)
        ended = forks.run(["collect", *parts, "-o", parts[0]], base, at=at, log=log)
        return ended.status, parts

    assert start(0)[0] == 0
    count = len(faults.journal(log))
    for at in range(1, count + 1):
        code, parts = start(at)
        assert code == -signal.SIGKILL
        state = open_checkpoint(parts[0])
        assert state.committed and state.manifest, (at, state.why)
        if state.manifest.nodes == 2:
            run("collect", *parts, "-o", parts[0])
        made = {n: d for n, d in tree(parts[0]).items() if n != "manifest.json"}
        assert made == tree(SOURCE), at


def test_collecting_takes_the_lock_that_the_doctor_looks_for(tmp_path: Path) -> None:
    parts = nodes(tmp_path)
    staging = tmp_path / "out/.checkpoint-2.saving"
    staging.mkdir(parents=True)
    with open(staging / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("collect", *parts, "-o", tmp_path / "out/checkpoint-2", code=1)
    run("collect", *parts, "-o", tmp_path / "out/checkpoint-2")
    assert os.listdir(tmp_path / "out") == ["checkpoint-2"]


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_lies_in_the_place_of_weights_is_named_with_what_helps(
    content: bytes, out: Run, later: Later, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = out.checkpoints()[-1].folder
    weights = newest / "model.safetensors"
    weights.write_bytes(content)
    later()
    run("verify", newest, code=1)
    said = capsys.readouterr().out
    assert ("it is a Git LFS pointer" if content else "it is empty") in said
    assert f"bring it back, or delete it, after which ckpt doctor {out.path} --fix" in said
    with pytest.raises(CheckpointError, match="or delete it, after which ckpt doctor"):
        wholeness.require(open_checkpoint(newest), uncommitted=False, needs_no_optimizer=False)
    run("show", newest)
    assert "committed; changed since its save: model.safetensors" in capsys.readouterr().out

    weights.unlink()
    run("doctor", out.path, "--fix")
    run("verify", newest)


def test_the_trainers_best_stays_and_is_marked(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    two, four = (checkpoint.folder for checkpoint in out.checkpoints())
    for folder in (two, four):
        path = folder / "trainer_state.json"
        content = json.loads(path.read_text()) if path.exists() else {"global_step": 4}
        path.write_text(json.dumps(content | {"best_model_checkpoint": f"elsewhere/{two.name}"}))
        commit(folder, int(folder.name.rpartition("-")[2]))
    run("ls", out.path)
    assert re.search(r"checkpoint-2 .* best ", capsys.readouterr().out)
    run("prune", out.path, "--keep-last", "1")
    assert "trainer_state.json names it" in capsys.readouterr().out and two.is_dir()

    out.point("best", open_checkpoint(four))
    run("prune", out.path, "--keep-last", "1")
    assert not two.exists()


def test_no_latest_is_wanted_where_accelerate_names_the_folders(
    tmp_path: Path, later: Later, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real(tmp_path, 2).folder
    folder.rename(tmp_path / "checkpoint_2")
    commit(tmp_path / "checkpoint_2", 2)
    later()
    run("doctor", tmp_path)
    assert "nothing to mend" in capsys.readouterr().err
    run("doctor", tmp_path, "--fix")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_2"]


def test_a_link_that_a_user_made_is_a_pointer_and_a_folder_is_in_the_way(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    two, four = (checkpoint.folder for checkpoint in out.checkpoints())
    for name, target in (("latest", four), ("best", two)):
        (out.path / name).unlink(missing_ok=True)
        (out.path / name).symlink_to(target.name)
    run("doctor", out.path, "--fix")
    assert "nothing to mend" in capsys.readouterr().err and (out.path / "latest").is_symlink()
    run("latest", out.path, "--best")
    assert capsys.readouterr().out == f"{two}\n"

    (out.path / "latest").unlink()
    run("to-fp32", four, "-o", out.path / "latest", code=1)
    assert "where a run has the file latest" in capsys.readouterr().err
    (out.path / "latest").mkdir()
    run("doctor", out.path, "--fix", code=1)
    assert "latest: is a folder, where DeepSpeed wants a file" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="latest is a folder, where the file is to be"):
        out.point("latest", open_checkpoint(four))


def test_prune_says_which_rest_of_a_deletion_it_removes(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (out.path / "checkpoint-9").mkdir()
    (out.path / "checkpoint-9/.deleted").touch()
    for options, verb in ((["--dry-run"], "would remove"), ([], "removed")):
        run("prune", out.path, "--keep-last", "2", *options)
        said = capsys.readouterr().err
        assert f"{verb} the rest of an interrupted deletion: checkpoint-9" in said
        assert "not touched" not in said
    assert not (out.path / "checkpoint-9").exists()
