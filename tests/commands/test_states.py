"""The states of checkpoints: committed, complete, incomplete; and what commands make of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_paths import close
from oracles import FIXTURES, ROOT, run
from run_folders import real, small
from safetensors.torch import load_file, save_file
from stock_checkpoints import (
    accelerates,
    dcp,
    lightnings,
    of_accelerate,
    of_engine,
    sharded,
    state,
    stock,
    trainers,
)

import ckpt
from ckpt.runs import manifest
from ckpt.runs.foreign import liveness
from ckpt.runs.run import Run
from ckpt.runs.states import checksums, listing
from ckpt.runs.states.status import statuses_of
from converters.storage import file_part

Make = Callable[[Path], object]
LOG = [
    {"loss": 1.5, "step": 6},
    {"eval_loss": 1.25, "eval_runtime": 3.0, "step": 6},
    {"eval_loss": 9.0, "step": 4},
]
WRITERS: dict[str, tuple[Make, int | None]] = {
    "the Trainer with DeepSpeed": (lambda out: stock(out, 6, LOG), 6),
    "the Trainer without DeepSpeed": (lambda out: trainers(out / "checkpoint-6", 6, log=LOG), 6),
    "the Trainer with FSDP": (lambda out: sharded(out / "checkpoint-6", 6), 6),
    "Accelerate without DeepSpeed": (lambda out: accelerates(out / "checkpoint_6"), None),
    "Lightning": (lambda out: lightnings(out / "epoch=0-step=6.ckpt", 6), 6),
    "torch's distributed checkpoint": (lambda out: dcp(out / "step-6"), 6),
    "DeepSpeed": (lambda out: shutil.copytree(FIXTURES / "zero2-bf16-w2", out), 2),
}


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The JSON that a command prints."""

    def command(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        run(*arguments, "--json", code=code)
        return json.loads(capsys.readouterr().out)

    return command


def flip(path: Path, record: str = "data/0") -> None:
    """Changes one byte of a record of a torch zip."""
    with zipfile.ZipFile(path) as archive:
        (info,) = (each for each in archive.infolist() if each.filename.endswith(record))
        payload = archive.read(info)
    data = bytearray(path.read_bytes())
    data[data.index(payload, info.header_offset) + len(payload) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_complete_checkpoint_is_one_to_every_command(
    writer: str, tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make, step = WRITERS[writer]
    out = tmp_path / "out"
    make(out)

    (entry,) = printed("ls", out)["checkpoints"]
    assert (entry["state"], entry["written_by"], entry["committed"]) == ("complete", writer, False)
    assert entry["step"] == step and entry["tier"] == "full" and entry["created"] and entry["bytes"]
    assert entry["reason"] == f"no manifest.json: written by {writer}"
    is_evaluated = writer in ("the Trainer with DeepSpeed", "the Trainer without DeepSpeed")
    assert entry["metrics"] == ({"eval_loss": 1.25} if is_evaluated else {})  # no time it took
    run("ls", out)
    assert f"complete, not committed: written by {writer}" in capsys.readouterr().out

    newest = printed("latest", out)
    assert newest["path"] == ckpt.find(out) and newest["state"] == "complete"
    assert newest["written_by"] == writer and newest["step"] == step
    run("latest", out)
    said = capsys.readouterr()
    assert said.out == f"{ckpt.find(out)}\n" and "is complete, not committed" in said.err

    for options in ((), ("--data",), ("--sample", "5%")):
        (verdict,) = printed("verify", out, *options)["checkpoints"]
        assert verdict["whole"] and verdict["state"] == "complete", verdict
        assert bool(verdict["checked_bytes"]) == bool(options)

    diagnosis = printed("doctor", out)
    assert diagnosis["findings"] == [] and len(diagnosis["untouched"]) == 1
    remains = printed("prune", out, "--keep-last", "1")
    assert remains["checkpoints"] == [] and remains["untouched"][0]["state"] == "complete"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_flipped_byte_is_found_in_what_has_a_checksum(
    writer: str, tmp_path: Path, printed: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    WRITERS[writer][0](out)
    (checkpoint,) = listing.checkpoints_at(out)
    planned = checksums.of_files(checkpoint.folder)
    tensors = [each for each in planned.checkables if not each.record.endswith(".pkl")]
    largest = max(tensors, key=lambda checkable: checkable.nbytes)
    with open(largest.path, "r+b") as stream:
        assert largest.directory is not None
        part = file_part.FilePart(
            checksums.LocalFile(largest.path, stream.fileno()), largest.start, largest.span
        )
        at = largest.start + largest.directory.payload(part, largest.record)
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))

    (verdict,) = printed("verify", out, "--data", code=1)["checkpoints"]
    (problem,) = verdict["problems"]
    assert problem.startswith(f"{largest.name}: record ") and "CRC32" in problem
    sizes = [path.stat().st_size for path in checkpoint.folder.rglob("*") if path.is_file()]
    total = sum(sizes) or checkpoint.folder.stat().st_size
    assert 0 < verdict["checked_bytes"] <= total - verdict["no_checksum_bytes"]


def test_what_carries_no_checksum_is_counted_and_named(
    tmp_path: Path, printed: Callable[..., Any]
) -> None:
    folder = trainers(tmp_path / "checkpoint-6", 6)
    names = ("model.safetensors", "trainer_state.json")
    (verdict,) = printed("verify", folder, "--data")["checkpoints"]
    assert verdict["no_checksum_bytes"] == sum((folder / name).stat().st_size for name in names)
    assert any(all(name in line for name in names) for line in verdict["proven"])


def test_a_sample_is_the_same_for_the_same_seed(
    tmp_path: Path, printed: Callable[..., Any]
) -> None:
    stock(tmp_path, 6)
    real(tmp_path, 8)
    first, again = (
        printed("verify", tmp_path, "--sample", "20%", "--seed", "7")["checkpoints"]
        for _ in range(2)
    )
    assert first == again
    everything = printed("verify", tmp_path, "--data")["checkpoints"]
    for part, all_of_it in zip(first, everything, strict=True):
        assert part["checked"] == "sample" and part["sample"] == 20.0 and part["seed"] == 7
        assert 0 < part["checked_bytes"] < all_of_it["checked_bytes"]
        assert all_of_it["seed"] is None
    drawn = printed("verify", tmp_path, "--sample", "1%")["checkpoints"]
    assert drawn[0]["seed"] is not None and drawn[0]["seed"] == drawn[1]["seed"]


def test_a_sample_of_all_finds_what_is_damaged_in_a_committed_checkpoint(
    tmp_path: Path, printed: Callable[..., Any]
) -> None:
    folder = real(tmp_path, 2).folder
    flip(folder / "scheduler.pt", "data.pkl")
    run("verify", folder, "--data", code=1)
    (verdict,) = printed("verify", folder, "--sample", "100", code=1)["checkpoints"]
    (problem,) = verdict["problems"]
    assert problem.startswith("scheduler.pt: record ") and verdict["state"] == "committed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sample", "0%"), "between 0% and 100%"),
        (("--sample", "many"), "such as 5%"),
        (("--sample", "5%", "--data"), "use one of them"),
        (("--seed", "5"), "add --sample"),
    ],
)
def test_samples_that_mean_nothing_are_bad_usage(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("verify", tmp_path, *arguments, code=2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("optimizer.pt", "has no optimizer.pt"),
        ("rng_state_0.pth", "none of rank 0 (rng_state_0.pth)"),
        ("model.safetensors", "has no weights of a model or adapter"),
        ("trainer_state.json", "has no trainer_state.json"),
    ],
)
def test_an_incomplete_checkpoint_says_what_is_missing(
    name: str, reason: str, tmp_path: Path, printed: Callable[..., Any]
) -> None:
    trainers(tmp_path / "checkpoint-4", 4)
    folder = trainers(tmp_path / "checkpoint-6", 6)
    (folder / name).unlink()
    for command in ("ls", "verify"):
        entries = printed(command, tmp_path, code=int(command == "verify"))["checkpoints"]
        assert [entry["state"] for entry in entries] == ["complete", "incomplete"]
        told = entries[1]["reason"] if command == "ls" else entries[1]["problems"][0]
        assert reason in told
    newest = printed("latest", tmp_path)
    assert newest["step"] == 4 and reason in newest["passed_over"][0]["reason"]
    (finding,) = printed("doctor", tmp_path, code=1)["findings"]
    assert reason in finding["problem"] and finding["remedy"] is None


def test_the_newest_is_last_whatever_the_names_are(
    tmp_path: Path, printed: Callable[..., Any]
) -> None:
    for number in (10, 9, 11):
        folder = accelerates(tmp_path / f"checkpoint_{number}")
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 + number, 1e9 + number))
    lightnings(tmp_path / "last.ckpt", 3)
    lightnings(tmp_path / "epoch=0-step=2.ckpt", 2)
    names = [entry["name"] for entry in printed("ls", tmp_path)["checkpoints"]]
    accelerate_names = [f"checkpoint_{number}" for number in (9, 10, 11)]
    assert names == [*accelerate_names, "epoch=0-step=2.ckpt", "last.ckpt"]


def test_a_folder_that_is_only_called_as_a_checkpoint_is_none(
    tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainers(tmp_path / "checkpoint-4", 4)
    images = tmp_path / "step_100"
    images.mkdir()
    (images / "sample.png").write_bytes(b"an image")
    (entry,) = printed("ls", tmp_path)["checkpoints"]
    assert entry["name"] == "checkpoint-4"
    run("verify", tmp_path)
    run("doctor", tmp_path)
    assert len(printed("prune", tmp_path, "--keep-last", "1")["untouched"]) == 1


@pytest.mark.parametrize("command", ["latest", "doctor", "prune"])
def test_a_checkpoint_of_another_writer_in_the_place_of_a_run_names_the_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dcp(tmp_path / "step-6")
    options = ("--keep-last", "1") if command == "prune" else ()
    run(command, tmp_path / "step-6", *options, code=1)
    said = capsys.readouterr().err
    assert "torch.distributed.checkpoint" in said
    assert said.endswith(f"name the folder that it lies in: ckpt {command} {tmp_path}\n")


@pytest.mark.parametrize("command", ["ls", "verify", "latest", "doctor"])
def test_the_folder_that_accelerate_makes_in_a_run_is_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerates(tmp_path / "checkpoints/checkpoint_0")
    run(command, tmp_path, code=1)
    assert f"{tmp_path}/checkpoints does: name that folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ls", "verify", "latest", "doctor", "prune"])
def test_runs_one_level_below_are_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        trainers(tmp_path / name / "checkpoint-4", 4)
    options = ("--keep-last", "1") if command == "prune" else ()
    run(command, tmp_path, *options, code=1)
    named = f"but these runs: {tmp_path / 'a'}, {tmp_path / 'b'}; name one of them\n"
    assert capsys.readouterr().err.endswith(named)


def test_a_training_that_begins_above_other_runs_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainers(tmp_path / "a/checkpoint-4", 4)
    assert ckpt.find(tmp_path) is None
    (record,) = caplog.records
    assert record.getMessage() == (
        f"no checkpoint to resume from: {tmp_path} holds no checkpoint itself, {tmp_path / 'a'} "
        "does: name that folder"
    )
    caplog.clear()
    (tmp_path / "a/checkpoint-4").rename(tmp_path / "checkpoint-4")  # the run has its own
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "does: name" not in caplog.text


def test_one_that_is_being_written_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trainers(tmp_path / "checkpoint-6", 6)
    looks = iter([liveness.look(folder)])
    look = liveness.look
    monkeypatch.setattr(liveness, "look", lambda path: next(looks, None) or look(path))
    (folder / "rng_state_2.pth").write_bytes(b"a rank that is late")
    checkpoints = listing.checkpoints_in(tmp_path)
    (status,) = statuses_of(checkpoints)
    assert status.state.value == "incomplete" and "is being written right now" in str(status.reason)


def test_latest_takes_the_newer_of_committed_and_complete(
    tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    real(tmp_path, 2)
    newer = stock(tmp_path, 4)
    assert printed("latest", tmp_path)["path"] == str(newer) == ckpt.find(tmp_path)
    real(tmp_path, 6)
    newest = printed("latest", tmp_path)
    assert newest["step"] == 6 and newest["state"] == "committed" and not newest["written_by"]
    run("latest", tmp_path, "--set", newer, "--dry-run", code=1)
    assert f"ckpt doctor {newer} --adopt commits it" in capsys.readouterr().err


def test_what_a_deletion_began_with_is_not_complete(
    tmp_path: Path, printed: Callable[..., Any]
) -> None:
    folder = real(tmp_path, 4).folder
    (folder / "manifest.json").rename(folder / ".deleted")
    (entry,) = printed("ls", tmp_path)["checkpoints"]
    assert entry["state"] == "incomplete" and "is being deleted" in entry["reason"]
    older = stock(tmp_path, 2)
    assert ckpt.find(tmp_path) == str(older)


def test_an_age_is_that_of_the_newest_file(tmp_path: Path, printed: Callable[..., Any]) -> None:
    folder = trainers(tmp_path / "checkpoint-4", 4)
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    run("pin", folder)
    (entry,) = printed("ls", tmp_path)["checkpoints"]
    assert entry["created"] == 1e9 and entry["marks"] == ["pinned"]


def test_committed_only_takes_none_without_a_manifest(tmp_path: Path) -> None:
    newer = stock(tmp_path, 4)
    with pytest.raises(
        ckpt.CheckpointError,
        match=r"none that is committed \(checkpoint-4\), and committed_only=True takes .*--adopt",
    ):
        ckpt.find(tmp_path, committed_only=True)
    with pytest.raises(ckpt.CheckpointError, match=r"ckpt doctor .*checkpoint-4 --adopt"):
        ckpt.find(newer, committed_only=True)
    older = real(tmp_path, 2).folder
    assert ckpt.find(tmp_path, committed_only=True) == str(older)
    assert ckpt.find(tmp_path) == str(newer)


def test_one_process_finds_a_checkpoint_without_torch(tmp_path: Path) -> None:
    newer = stock(tmp_path, 4)
    code = (
        "import sys\nsys.modules['torch'] = None\nimport ckpt\n"
        "print(ckpt.find(sys.argv[1]), ckpt.find(sys.argv[1] + '/new'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{newer} None\n", done.stderr
    assert f"ckpt: {newer} is complete, not committed (written by the Trainer" in done.stderr


def test_doctor_adopts_one_checkpoint_and_leaves_the_others(
    tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        stock(tmp_path, step, LOG)
    one = tmp_path / "checkpoint-4"
    assert printed("doctor", one, "--adopt", "--dry-run")["checkpoints"][0]["adopted"]
    assert not listing.candidate(one).committed
    run("doctor", one, "--adopt", "--now")
    assert [entry.committed for entry in listing.checkpoints_in(tmp_path)] == [False, True]
    run("verify", one, "--data")
    capsys.readouterr()
    run("prune", tmp_path, "--keep-last", "1")
    said = capsys.readouterr()
    assert (
        "not touched: 1 checkpoint is complete but not committed; "
        f"ckpt doctor {tmp_path} --adopt commits it"
    ) in said.err
    run("slim", tmp_path / "checkpoint-2", code=1)
    assert f"commit it first: ckpt doctor {tmp_path / 'checkpoint-2'} --adopt" in (
        capsys.readouterr().err
    )


def test_now_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(tmp_path, 4)

    def sleep(_: float) -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr(liveness.time, "sleep", sleep)
    run("doctor", tmp_path, "--adopt", "--now")
    run("doctor", tmp_path, "--now", code=2)


@pytest.mark.parametrize("name", ["pp_z1bf", "moe_s2", "tp_z2_w4"])
def test_more_parallelism_than_zero_is_adopted_and_its_weights_are_compared(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "corpus" / name, folder, ignore=shutil.ignore_patterns("live*"))
    run("to-fp32", folder, "-o", tmp_path / "model", "--dtype", "bf16", "--names", "as-stored")
    shutil.copy(tmp_path / "model/model.safetensors", folder)
    run("verify", folder, "--data")
    same = "in model.safetensors are those of the states"
    assert same in capsys.readouterr().out
    run("doctor", tmp_path, "--adopt", "--now")
    run("verify", folder, "--data")
    assert same in capsys.readouterr().out

    tensors = load_file(folder / "model.safetensors")
    changed = {key: tensor + 1 for key, tensor in tensors.items()}
    (folder / "manifest.json").unlink()
    save_file(changed, folder / "model.safetensors")
    run("verify", folder, "--data", code=1)
    run("doctor", tmp_path, "--adopt", "--now", code=1)
    said = capsys.readouterr()
    assert "the weights are of another step" in said.out and not Run(tmp_path).newest()


def test_the_experts_of_one_rank_are_not_taken_for_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the Trainer alone writes them: half of each stack, under its name."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "corpus/aep_z3", folder, ignore=shutil.ignore_patterns("live*"))
    run("to-fp32", folder, "-o", tmp_path / "model", "--names", "as-stored")
    tensors = load_file(tmp_path / "model/model.safetensors")
    stacks = {key: tensor for key, tensor in tensors.items() if tensor.dim() == 3}
    halves = {key: tensor.chunk(2)[0].contiguous() for key, tensor in stacks.items()}
    assert halves
    save_file({**tensors, **halves}, folder / "model.safetensors")
    run("verify", folder, "--data", code=1)
    assert "a trainer wrote the experts that its first rank has" in capsys.readouterr().out


def test_what_cannot_be_adopted_is_a_note_and_no_failure(
    tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainers(tmp_path / "checkpoint-2", 2)
    lightnings(tmp_path / "step=4.ckpt", 4)
    shutil.copytree(FIXTURES / "corpus/pp_z1bf", tmp_path / "checkpoint-6")
    stock(tmp_path, 8)
    run("doctor", tmp_path, "--adopt", "--dry-run")
    said = capsys.readouterr()
    adoptable = [str(tmp_path / f"checkpoint-{step}") for step in (2, 6, 8)]
    assert sorted(said.out.splitlines()) == [f"would adopt\t{path}" for path in adoptable]
    note, *_, unproven = said.err.splitlines()
    assert "step=4.ckpt is complete, written by Lightning; " in note
    assert "it is not of a kind that is committed, so that ckpt doctor --adopt" in note
    assert "had no checksum and would be taken as they are (model.safetensors, " in unproven
    entries = printed("doctor", tmp_path, "--adopt", "--dry-run")["checkpoints"]
    skipped = [entry["path"] for entry in entries if not entry["adopted"]]
    assert skipped == [str(tmp_path / "step=4.ckpt")]
    assert {entry["state"] for entry in entries} == {"complete"}

    (tmp_path / "checkpoint-8/latest").unlink()
    run("doctor", tmp_path, "--adopt", code=1)
    assert "not adopted\t" in capsys.readouterr().out

    of_engine(tmp_path / "engine")
    run("doctor", tmp_path / "engine")
    assert "it is a tag in a save_dir, so that" in capsys.readouterr().err


def test_adoption_reads_each_byte_once_and_says_so(tmp_path: Path) -> None:
    from ckpt.runs.upkeep import adoption

    stock(tmp_path, 4)
    statuses = adoption.survey(listing.checkpoints_in(tmp_path), wait=False)
    seen: list[int] = []
    adoption.adopt(statuses, dry_run=True, progress=seen.append)
    assert sum(seen) == adoption.nbytes_of(statuses) > 0


def test_tags_of_a_save_dir_are_listed_each(tmp_path: Path, printed: Callable[..., Any]) -> None:
    out = shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path / "out")
    shutil.copytree(out / "global_step2", out / "global_step4")
    entries = printed("ls", out)["checkpoints"]
    assert [entry["name"] for entry in entries] == ["global_step2", "global_step4"]
    assert printed("latest", out)["path"] == str(out)  # a save_dir, as latest in it says
    assert printed("doctor", out, "--adopt")["checkpoints"][0]["adopted"] is False


def test_weights_alone_are_complete_and_nothing_is_resumed_from_them(
    tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-4"
    small(tmp_path / "elsewhere", 4, tier="weights")
    folder.mkdir()
    shutil.copy(FIXTURES / "trainer-zero2/checkpoint-2/model.safetensors", folder)
    (folder / "trainer_state.json").write_text(state(4))
    (entry,) = printed("ls", folder)["checkpoints"]
    assert (entry["state"], entry["tier"]) == ("complete", "weights")
    run("verify", folder)
    run("latest", tmp_path, code=1)
    assert "holds weights only" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_model_under_the_name_of_a_checkpoint_is_no_torn_save(
    name: str, tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path, 4)  # so that the run is one of DeepSpeed
    folder = tmp_path / "checkpoint-8"
    folder.mkdir()
    stem = "model" if name == "config.json" else "adapter_model"
    (folder / name).write_text("{}")
    save_file({"w": torch.ones(3)}, folder / f"{stem}.safetensors")
    for path in (folder, *folder.iterdir()):
        os.utime(path, (1e9, 1e9))

    entry = printed("ls", tmp_path)["checkpoints"][-1]
    assert (entry["state"], entry["tier"], entry["step"]) == ("complete", "weights", 8)
    assert entry["reason"] == "complete, model only, cannot be resumed" and not entry["written_by"]
    run("ls", tmp_path)
    assert "  complete, model only, cannot be resumed\n" in capsys.readouterr().out
    run("verify", folder)
    run("doctor", tmp_path, "--fix")
    assert "1 checkpoint has a model only and cannot be resumed (checkpoint-8)" in (
        capsys.readouterr().err
    )
    assert folder.is_dir() and ckpt.find(tmp_path) == str(tmp_path / "checkpoint-4")

    (folder / "training_args.bin").write_bytes(b"")  # the Trainer began to save
    assert printed("ls", tmp_path)["checkpoints"][-1]["state"] == "incomplete"


@pytest.mark.parametrize("name", ["step-6", "checkpoint-6"])
def test_what_fsdp_functions_saved_is_complete_under_any_name(
    name: str, tmp_path: Path, printed: Callable[..., Any]
) -> None:
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp(tmp_path / name / part)
    (entry,) = printed("ls", tmp_path)["checkpoints"]
    assert (entry["state"], entry["written_by"]) == ("complete", "FSDP")
    assert ckpt.find(tmp_path) == str(tmp_path / name)

    older = sharded(tmp_path / "checkpoint-4", 4)  # the Trainer needs its trainer_state.json
    newest = printed("latest", tmp_path)
    assert newest["path"] == str(older)
    assert "no trainer_state.json" in newest["passed_over"][0]["reason"]


def test_a_file_of_the_torch_format_without_checksums_is_counted_as_such(tmp_path: Path) -> None:
    folder = trainers(tmp_path / "checkpoint-4", 4)
    path = folder / "scheduler.pt"
    torch.save({"last_epoch": 4}, path, _use_new_zipfile_serialization=False)
    bare = {entry.name: entry.nbytes for entry in checksums.of_files(folder).bare}
    assert bare["scheduler.pt"] == path.stat().st_size


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_weights_that_no_resume_reads_are_named_with_the_remedy(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stock(tmp_path, 6)
    weights = folder / "model.safetensors"
    weights.write_bytes(content)
    for command in ("latest", "verify", "doctor"):
        run(command, tmp_path, code=1)
        printed = capsys.readouterr()
        remedy = "no resume reads model.safetensors: bring it back, or delete it"
        assert remedy in printed.out + printed.err, command

    weights.unlink()
    assert ckpt.find(tmp_path) == str(folder)
    run("doctor", tmp_path, "--adopt")


def test_a_closed_folder_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As lost+found at the root of a volume: no list, repair or retention stops at it."""
    for step in (2, 4):
        small(tmp_path, step)
    (tmp_path / "lost+found").mkdir()
    close(monkeypatch, tmp_path / "lost+found")

    for arguments, code in (
        (("ls", tmp_path), 0),
        (("doctor", tmp_path, "--fix"), 0),
        (("prune", tmp_path, "--keep-last", "1"), 0),
    ):
        capsys.readouterr()
        run(*arguments, code=code)
        assert "passed over what cannot be read: lost+found" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("name", ["", "rng_state_1.pth"])
def test_a_checkpoint_that_cannot_be_read_is_one_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    """The others are listed as ever, and nothing is decided that it could change."""
    trainers(tmp_path / "checkpoint-2", 2)
    trainers(tmp_path / "checkpoint-4", 4)
    close(monkeypatch, tmp_path / "checkpoint-2" / name)

    rows = printed("ls", tmp_path)["checkpoints"]
    assert [row["state"] for row in rows] == ["incomplete", "complete"]
    assert rows[0]["reason"].startswith("cannot be read: ")
    verdicts = printed("verify", tmp_path, code=1)["checkpoints"]
    assert [verdict["whole"] for verdict in verdicts] == [False, True]
    findings = printed("doctor", tmp_path, "--fix", code=1)["findings"]
    assert [(entry["remedy"], entry["mended"]) for entry in findings] == [(None, False)]


def test_a_trainers_rank_0_alone_is_not_all_ranks(
    tmp_path: Path, printed: Callable[..., Any]
) -> None:
    """A training of one rank writes rng_state.pth."""
    (trainers(tmp_path / "checkpoint-2", 2) / "rng_state_1.pth").unlink()
    trainers(tmp_path / "checkpoint-4", 4, ranks=1)
    rows = printed("ls", tmp_path)["checkpoints"]
    assert "none of rank 1 (rng_state_1.pth)" in rows[0]["reason"]
    assert rows[1]["state"] == "complete"


def test_a_sample_is_a_part_of_the_bytes(tmp_path: Path) -> None:
    """Among many small records and a few large ones these are drawn, too."""
    sizes = [1] * 1000 + [1000] * 20
    checkables = [checksums.Checkable(tmp_path, str(n), size) for n, size in enumerate(sizes)]
    plan = checksums.ChecksumPlan(tuple(checkables), total=len(checkables))
    for seed in range(20):
        sample = plan.sample(5, seed)
        assert plan.nbytes * 0.05 <= sample.nbytes < plan.nbytes * 0.05 + 1000
        assert sample == plan.sample(5, seed)


def test_advice_on_two_trainings_is_what_helps_and_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No manifest is for Lightning's; of others, the command works as it is typed."""
    logs = [[{"loss": loss, "step": 2}] for loss in (1.0, 2.0)]
    run_folder = tmp_path / "my run"
    for step, log in zip((2, 4), logs, strict=True):
        trainers(run_folder / f"checkpoint-{step}", step, log=log)
    run("doctor", run_folder)
    assert f"ckpt doctor '{run_folder}' --adopt keeps them apart" in capsys.readouterr().err
    run("doctor", run_folder, "--adopt")
    runs = {checkpoint.manifest.run for checkpoint in Run(run_folder).checkpoints()}
    assert len(runs) == 2


@pytest.mark.parametrize("write", [trainers, sharded, accelerates])
def test_what_was_saved_without_deepspeed_is_adopted(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all of its files, so that one that is lost or changed is named."""
    folder = tmp_path / "checkpoint-3"
    write(folder, *([3] if write is not accelerates else []))
    run("doctor", folder, "--adopt", "--now")
    adopted = manifest.read(folder)
    assert (adopted.step, adopted.tag, adopted.world_size, adopted.stage) == (3, None, 2, None)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert adopted.files.keys() == present - {"manifest.json"}
    assert ckpt.find(tmp_path) == str(folder)
    run("verify", folder, "--data")
    next(folder.glob("*optimizer*/.metadata" if write is sharded else "optimizer.*")).unlink()
    run("verify", folder, code=1)


def test_a_distributed_checkpoint_is_adopted_with_the_step_of_its_name(tmp_path: Path) -> None:
    dcp(tmp_path / "step-7")
    run("doctor", tmp_path, "--adopt", "--now")
    adopted = manifest.read(tmp_path / "step-7")
    assert adopted.step == 7 and {*adopted.files} == {".metadata", "__0_0.distcp"}


def test_show_has_the_state_of_every_trainer_and_the_file_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = (trainers(tmp_path / "checkpoint-2", 2), accelerates(tmp_path / "checkpoint_1"))
    for folder, name in zip(folders, ("optimizer.pt", "optimizer.bin"), strict=True):
        run("show", folder)
        assert "state        complete, not committed" in capsys.readouterr().out
        (folder / name).unlink()
        run("show", folder)
        said = capsys.readouterr().out
        assert f"incomplete: has no {name}" in said and f"missing      {name}" in said
        assert "if nothing is missing" in said  # which show and to-fp32 say alike

    run("show", lightnings(tmp_path / "last.ckpt", 3))
    assert "state        complete, not committed; written by Lightning" in capsys.readouterr().out


def test_random_states_of_a_rank_that_may_be_lost_are_said(
    tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows: a run may have gone on with fewer ranks."""
    for number in (0, 1):
        accelerates(tmp_path / f"checkpoint_{number}")
    (tmp_path / "checkpoint_1/random_states_1.pkl").unlink()
    entries = {entry["name"]: entry for entry in printed("ls", tmp_path)["checkpoints"]}
    assert {entry["state"] for entry in entries.values()} == {"complete"}
    assert entries["checkpoint_0"]["doubt"] is None
    lost = "has no random_states_1.pkl, which checkpoint_0 has"
    assert entries["checkpoint_1"]["doubt"].startswith(lost)
    run("verify", tmp_path / "checkpoint_1")
    assert lost in capsys.readouterr().out

    with_deepspeed = of_accelerate(tmp_path / "with")
    (with_deepspeed / "random_states_1.pkl").unlink(missing_ok=True)
    run("verify", with_deepspeed)
    assert "has no random_states_1.pkl, and its states are of 2 ranks" in capsys.readouterr().out

    (with_deepspeed / "random_states_0.pkl").write_bytes(b"")
    run("reshard", with_deepspeed, "--world-size", "4", "--dry-run")
    printed = "".join(capsys.readouterr())
    assert "random_states_1.pkl, random_states_3.pkl cannot be made: the file of" in printed
