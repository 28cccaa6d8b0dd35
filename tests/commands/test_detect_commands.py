"""Every command, at a path of every kind, does its work or names the kind and what handles it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from kind_cases import CASES, NAME, dcp, tensors, touch
from oracles import FIXTURES, run
from run_folders import real
from safetensors.numpy import save_file

import ckpt
from ckpt.cli import report
from ckpt.cli.main import main
from ckpt.runs.upkeep import findings
from converters.detect import Detection, detect, read, sharded
from converters.detect.kinds import KINDS
from converters.errors import CheckpointError
from converters.source import Place, Source, SourceTopology
from converters.tensors import Weights

COMMANDS = {
    "ls": (),
    "verify": (),
    "latest": (),
    "doctor": (),
    "doctor --adopt": (),
    "prune": ("--keep-last", "1"),
    "pin": (),
    "unpin": (),
    "slim": (),
    "push": ("org/name",),
    "reshard": ("--world-size", "1"),
    "to-universal": (),
    "from-universal": ("--world-size", "1"),
    "collect": ("-o", "joined"),
    "show": (),
    "to-fp32": (),
}
TAG = "global_step2"  # of zero2-bf16-w2
WITHOUT_DRY_RUN = ("ls", "verify", "latest", "show")
REWRITTEN = ("deepspeed-pipeline", "deepspeed-model-parallel", "deepspeed-experts")
ON_RUNS = ("ls", "verify", "latest", "doctor", "doctor --adopt", "prune", "pin", "unpin")
# What a command takes at a path of a kind, and so says nothing of the kind: --tag is no option of
# the commands on runs, and a folder with a manifest is a checkpoint of ckpt's own.
RUN_INSTEAD = ("show", "to-fp32")  # which name the checkpoints of a run, and --last
TAKEN = {
    "no-tag": tuple(COMMANDS),
    "deepspeed": tuple(COMMANDS),
    "deepspeed-several": (*ON_RUNS, *RUN_INSTEAD, "push", "slim", "collect"),
    "weights-tier": (*ON_RUNS, "slim", "push", "collect"),
    "slimmed": (*ON_RUNS, "slim", "push", "collect"),
    # a run of what torch.distributed.checkpoint saved, and a checkpoint of Lightning
    "parent": ("ls", "verify", "latest", "doctor", "doctor --adopt", "prune", "push"),
    **dict.fromkeys(sharded.READ, ("ls", "verify", "doctor --adopt", "push")),
    "lightning-file": ("ls", "verify", "doctor --adopt"),
    "deepspeed-universal": tuple(COMMANDS),
    **dict.fromkeys(("adapter", "gathered-16bit", "safetensors", "torch-bin"), ("push",)),
    **dict.fromkeys(("trainer", "accelerate"), ("push",)),
    **dict.fromkeys(REWRITTEN, tuple(name for name in COMMANDS if name != "from-universal")),
}


def names(text: str, detection: Detection) -> bool:
    """Whether a message names the kind: in the words of its statement, or by its title."""
    expected = "\0"
    statement = detection.kind.description(detection.evidence, expected)
    return statement.partition(expected)[0] in text or detection.kind.title in text


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_every_command_names_what_lies_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And changes nothing there: what it is run on is what the one before has left."""
    path = CASES[name][0](tmp_path)
    detection, before = detect(path), contents(tmp_path)
    for command, arguments in COMMANDS.items():
        verb, *options = command.split()
        options += [] if verb in WITHOUT_DRY_RUN else ["--dry-run"]
        with pytest.raises(SystemExit) as exit:
            main([verb, str(path), *arguments, *options])

        printed = capsys.readouterr()
        assert "Traceback" not in printed.err and exit.value.code in (0, 1), (command, printed)
        if command not in TAKEN.get(name, ()):
            assert names(printed.out + printed.err, detection), (command, printed)
        assert contents(tmp_path) == before, command


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """The length and the time of change of all that lies in a folder."""
    facts = {str(path): path.lstat() for path in folder.rglob("*")}
    return {path: (fact.st_size, fact.st_mtime_ns) for path, fact in facts.items()}


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_a_kind_says_what_it_is_and_what_to_do(name: str, tmp_path: Path) -> None:
    detection = detect(CASES[name][0](tmp_path), "global_step9" if name == "no-tag" else None)
    sentence = str(detection.unlike("a thing"))
    assert sentence.startswith(str(detection.folder)) and "{" not in sentence
    assert names(sentence, detection)
    if detection.kind.remedy:
        contrast = detection.kind.contrast or "a thing"
        assert f"{contrast}; " in sentence
        assert str(detection.unlike("a thing", "do this")).endswith(f"{contrast}; do this")


@pytest.mark.parametrize("command", ["pin", "unpin", "slim"])
def test_a_run_in_the_place_of_a_checkpoint_names_its_checkpoints(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        real(tmp_path, step)
    run(command, tmp_path, code=1)
    assert capsys.readouterr().err == (
        f"ckpt: {tmp_path} is a run, not a checkpoint; it holds the checkpoints checkpoint-2, "
        f"checkpoint-4: name one of them, such as ckpt {command} {tmp_path / 'checkpoint-4'}\n"
    )


@pytest.mark.parametrize("command", ["latest", "doctor", "prune --keep-last 1"])
def test_a_checkpoint_in_the_place_of_a_run_names_the_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real(tmp_path, 2)
    verb, *options = command.split()
    run(verb, tmp_path / "checkpoint-2", *options, code=1)
    line = capsys.readouterr().err
    assert "is a checkpoint, not a run; name the folder that it lies in: " in line
    assert line.endswith(f": ckpt {verb} {tmp_path}\n")


def test_push_of_a_file_says_what_publishes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tensors(tmp_path / "model/model.safetensors")
    run("push", folder / "model.safetensors", "org/name", code=1)
    line = capsys.readouterr().err
    assert f"is a file of weights in safetensors, not a folder; ckpt push {folder} pub" in line
    run("push", CASES["lightning-file"][0](tmp_path), "org/name", code=1)
    assert "hf upload" in capsys.readouterr().err


@pytest.mark.parametrize("call", ["open", "find"])
@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.name != "no-tag"])
def test_a_function_names_what_lies_there(
    name: str, call: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    path = CASES[name][0](folder)
    detection = detect(path)
    is_read = detection.kind.reader is not None or name == "deepspeed-several"
    try:
        opened = ckpt.open(path, "np") if call == "open" else ckpt.find(path)
    except CheckpointError as error:
        text = f"{caplog.text}\n{error}"
        is_damaged = name == "misplaced-weights" or call == "find"  # which reads what is here
        assert is_read or is_damaged or names(text, detection)
        assert str(path) in text
    else:
        begins = opened is None and name in ("nothing", "empty", "unknown", "unfinished-download")
        is_found = call == "find" and name == "parent" and str(opened) == f"{path}/step-5"
        assert is_read or begins or is_found or names(caplog.text, detection)


@pytest.mark.parametrize(
    ("path", "fetch"),
    [
        ("org/name", "ckpt pull org/name DIR"),
        ("https://huggingface.co/org/name", "ckpt pull org/name DIR"),
        ("https://hf.co/org/name/tree/step-5", "ckpt pull org/name@step-5 DIR"),
        ("https://huggingface.co/org/name/blob/main/model.safetensors", "ckpt pull org/name DIR"),
        ("hf://org/name@v1", "ckpt pull org/name@v1 DIR"),
        ("hf://models/org/name", "ckpt pull org/name DIR"),
        ("hf://gpt2", "ckpt pull gpt2 DIR"),
        ("https://huggingface.co/gpt2", "ckpt pull gpt2 DIR"),
        ("https://huggingface.co/gpt2/tree/refs/pr/3", "ckpt pull gpt2@refs/pr/3 DIR"),
        ("https://huggingface.co/gpt2/resolve/main/model.safetensors", "ckpt pull gpt2 DIR"),
        ("https://huggingface.co/papers/2101.00001", "it is no repository of the Hub"),
        ("https://huggingface.co/models", "it is no repository of the Hub"),
        (
            "https://huggingface.co/datasets/org/name",
            "hf download org/name --repo-type dataset --local-dir DIR",
        ),
        (
            "https://huggingface.co/datasets/org/name/resolve/main/a.bin",
            "curl -LO https://huggingface.co/datasets/org/name/resolve/main/a.bin",
        ),
        ("http://mirror.example/hub/org/name", "ckpt pull org/name DIR"),
        ("s3://bucket/run", "aws s3 cp --recursive s3://bucket/run DIR"),
        ("gs://bucket/run", "gcloud storage cp --recursive gs://bucket/run DIR"),
        ("https://example.org/a.bin", "curl -LO https://example.org/a.bin"),
    ],
)
def test_what_lies_elsewhere_is_answered_with_what_fetches_it(
    path: str,
    fetch: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example/hub")
    for command, arguments in COMMANDS.items():
        verb, *options = command.split()
        run(verb, path, *arguments, *options, code=1)
        line = capsys.readouterr().err
        assert fetch in line and line.count("\n") == 1, (command, line)


def test_a_checkpoint_that_is_not_there_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path in ("out/model", "runs/checkpoint-5", "a/b/c", "./org/name/", str(tmp_path / "x/y")):
        run("show", path, code=1)
        is_name = path == "./org/name/"  # as Path writes it
        assert ("ckpt pull" in capsys.readouterr().err) == is_name


def test_a_checkpoint_of_another_library_in_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dcp(tmp_path / "checkpoint-5")
    run("ls", tmp_path)
    assert "complete, not committed: written by torch's distributed checkpoint" in (
        capsys.readouterr().out
    )
    run("slim", tmp_path / "checkpoint-5", code=1)
    assert "not a DeepSpeed checkpoint; ckpt show, to-fp32" in capsys.readouterr().err

    (tmp_path / "checkpoint-5" / ".metadata").unlink()
    run("ls", tmp_path)
    assert "checkpoint of FSDP or torch.distributed.checkpoint; incomplete: " in (
        capsys.readouterr().out
    )
    run("slim", tmp_path / "checkpoint-5", code=1)
    line = capsys.readouterr().err
    assert "has no .metadata, which is written last" in line and "ckpt show" not in line


@pytest.mark.parametrize("name", ["megatron", "dcp-safetensors", "gguf"])
def test_a_resume_does_not_begin_anew_over_a_checkpoint_of_another_library(
    name: str, tmp_path: Path
) -> None:
    path = CASES[name][0](tmp_path)
    with pytest.raises(CheckpointError) as error:
        ckpt.find(path)
    assert names(str(error.value), detect(path))


def test_a_resume_says_which_weights_lie_where_a_training_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ckpt.find(touch(tmp_path / "new", "train.log")) is None
    assert not caplog.text
    assert ckpt.find(tensors(tmp_path / "model/model.safetensors")) is None
    assert "is a model in safetensors" in caplog.text
    with pytest.raises(CheckpointError, match="s3://bucket/run is a URL"):
        ckpt.find("s3://bucket/run")


@pytest.mark.parametrize("name", ["git-lfs-pointer", "archive", "gguf", "other-file", "dcp-file"])
def test_a_file_is_opened_by_what_it_is(name: str, tmp_path: Path) -> None:
    path = CASES[name][0](tmp_path)
    with pytest.raises(CheckpointError) as error:
        ckpt.open(path, "np")
    detection = detect(path)
    more = ", or a file of weights (.safetensors, .bin, .pt)"  # which nothing else takes
    more = more if detection.kind.name == "other-file" else ""
    assert str(error.value) == f"{detection.refusal}{more}"


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload"])
@pytest.mark.parametrize("name", ["model.safetensors", "run.tar.gz", "model.gguf", "model.bin"])
def test_an_unfinished_download_is_one_by_itself_and_in_its_folder(
    name: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(b"GGUF" if name.endswith("gguf") else b"PK\3\4")
    for place in (path, tmp_path):
        detection = detect(place)
        assert detection.kind.name == "unfinished-download"
        assert "is a download that did not end: download it again" in str(detection.refusal)
    assert f"{path.name} is a download that did not end" in str(detect(tmp_path / name).refusal)


def test_a_model_whose_shards_are_still_to_come_is_unfinished(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors.index.json", "config.json")
    save_file({"a": np.ones(3, "f4")}, tmp_path / "model-00001-of-00002.safetensors")
    assert detect(tmp_path).kind.name == "safetensors"
    coming = tmp_path / "model-00002-of-00002.safetensors.incomplete"
    coming.touch()
    assert detect(tmp_path).kind.name == "unfinished-download"
    with pytest.raises(CheckpointError, match="is a download that did not end"):
        ckpt.open(tmp_path, "np")
    save_file({"b": np.ones(3, "f4")}, coming.with_suffix(""))  # what is left is of no concern
    assert detect(tmp_path).kind.name == "safetensors"


def test_a_snapshot_of_the_hub_cache_without_its_weights_is_unfinished(tmp_path: Path) -> None:
    touch(tmp_path, "models--a--b/snapshots/abc/config.json", "models--a--b/blobs/f0.incomplete")
    detection = detect(tmp_path / "models--a--b/snapshots/abc")
    assert detection.kind.name == "unfinished-download"
    assert "run hf download again" in str(detection.refusal)


def source(topology: SourceTopology | None, place: Path) -> Source:
    return Source(
        kind="safetensors",
        place=Place(place, place, "step5"),
        weights=Weights(tensors={}, order=()),
        files={},
        topology=topology,
        step=5,
    )


def test_show_says_of_other_sources_only_what_is_known(tmp_path: Path) -> None:
    text = "\n".join(report.show_lines(report.show(source(None, tmp_path))))
    assert text.startswith(f"kind         weights in safetensors\nfolder       {tmp_path}\n")
    assert "ZeRO" not in text and "DeepSpeed" not in text and "None" not in text
    assert "\nstep         5\n" in text
    assert "world size   4" in "\n".join(
        report.show_lines(report.show(source(SourceTopology(4), tmp_path)))
    )
    zero = "\n".join(report.show_lines(report.show(read(FIXTURES / NAME))))
    assert "\nZeRO stage   2\nworld size   2\n" in zero and "\nDeepSpeed    0." in zero


@pytest.mark.parametrize(
    ("name", "degrees", "words"),
    [
        ("pipelines-and-experts/pipeline-zero1", (1, 2, ()), " (2 pipeline stages)"),
        (
            "pipelines-and-experts/autoep-zero3-tensor",
            (2, 1, (4,)),
            " (2 tensor-parallel ranks, experts on 4 ranks)",
        ),
        ("zero3-bf16-w2", (None, None, None), ""),
    ],
)
def test_show_says_how_many_ranks_share_a_model(
    name: str, degrees: tuple[object, ...], words: str
) -> None:
    result = report.show(read(FIXTURES / name))
    assert (result.tensor_ranks, result.pipeline_stages, result.expert_ranks) == degrees
    assert any(
        line.startswith("world size") and line.endswith(f"{result.world_size}{words}")
        for line in report.show_lines(result)
    )


def test_a_doctor_of_a_folder_without_checkpoints_still_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors(tmp_path / "model.safetensors")
    shutil.copytree(FIXTURES / NAME, tmp_path / ".checkpoint-5.trash")
    run("doctor", tmp_path, "--fix")
    assert "a deletion that was interrupted" in capsys.readouterr().out
    run("doctor", tmp_path, code=1)
    assert "is a model in safetensors, not a run" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", None])
def test_what_can_be_named_in_the_place_of_a_latest_without_a_tag(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path / "out")
    tag = next(path for path in folder.iterdir() if path.is_dir())
    (folder / "latest").unlink()
    if text is not None:
        (folder / "latest").write_text(text)

    run("show", folder, code=1)
    line = capsys.readouterr().err
    assert line.endswith(f"; it holds the tag {tag.name}: name its folder, {tag}\n")
    assert "which is not there" not in line and "--tag" not in line
    run("show", tag)

    shutil.copytree(tag, folder / "again")
    run("show", folder, code=1)
    assert f"the tags again, {tag.name}: name the folder of one, " in capsys.readouterr().err
    run("doctor", folder, code=0 if text is None else 1)
    assert "''" not in capsys.readouterr().out


def test_a_state_file_is_told_to_be_of_the_folder_it_lies_in(tmp_path: Path) -> None:
    """Of the tag's folder, or of the one whose file latest leads to it."""
    for folder in (tmp_path, tmp_path / "global_step5"):
        folder.mkdir(exist_ok=True)
        detection = detect(CASES["deepspeed-file"][0](folder))
        assert str(detection.unlike("a universal checkpoint")) == (
            f"{detection.path} is one state file of a DeepSpeed checkpoint (one rank's part), "
            f"not a universal checkpoint; the checkpoint is its folder: {tmp_path}"
        )
        (tmp_path / "latest").write_text("global_step5")


@pytest.mark.parametrize("command", ["latest", "doctor", "prune --keep-last 1"])
def test_the_folder_of_a_tag_in_the_place_of_a_run_names_the_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real(tmp_path, 2)
    saved = shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path / "saved")
    verb, *options = command.split()
    for tag, named in ((tmp_path / "checkpoint-2/global_step2", tmp_path), (saved / TAG, saved)):
        run(verb, tag, *options, code=1)
        line = capsys.readouterr().err
        assert "is the folder of a tag, not a run; " in line
        assert line.endswith(f": ckpt {verb} {named}\n")


@pytest.mark.parametrize("damage", ["missing", "pointer"])
def test_doctor_finds_the_damage_of_what_deepspeed_saved(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "QUIET", 0.0)
    saved = shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path / "saved")
    states = sorted((saved / TAG).glob("*optim_states.pt"))[1]
    states.unlink()
    if damage == "pointer":
        states.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    run("doctor", saved, code=1)
    assert f"found\t{saved / TAG}: incomplete: " in capsys.readouterr().out


def test_a_find_says_of_what_it_passes_over_what_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "pytorch_model_fsdp.bin").write_bytes(b"")
    with caplog.at_level("WARNING"), contextlib.suppress(CheckpointError):
        ckpt.find(tmp_path)
    assert "not whole: " in caplog.text
    assert "not whole: is " not in caplog.text and "not whole: has " not in caplog.text
