"""What lies at a path, from names and first bytes alone, and what a user is told of it."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePath

import pytest
import torch
from kind_cases import CASES, NAME, dcp, tensors, touch
from oracles import FIXTURES, ROOT, run

import ckpt
from ckpt.distributed.ranks import RankGroup
from converters import options as options_in_messages
from converters.detect import detect, filenames, sharded
from converters.detect import read as read_any
from converters.detect.detection import reader
from converters.detect.kinds import BY_NAME, KINDS
from converters.errors import CheckpointError
from converters.source import Source
from converters.zero import checkpoint as zero


def test_every_kind_has_a_case_here() -> None:
    assert CASES.keys() == BY_NAME.keys()
    assert len(BY_NAME) == len(KINDS)


@pytest.mark.parametrize("name", CASES)
def test_a_kind_is_recognised_and_its_user_is_told_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, remedy = CASES[name]
    path = build(tmp_path)
    options = ["--tag", "global_step9"] if name == "no-tag" else []
    with options_in_messages.using(options_in_messages.of_commands):
        detection = detect(path, options[1] if options else None)
        refusal = detection.refusal
    assert detection.kind is BY_NAME[name]
    facts = {
        "deepspeed": "ZeRO stage 2, 2 ranks",
        "deepspeed-universal": "ZeRO stage 2, 2 ranks",
        "deepspeed-experts": "ZeRO stage 1, 2 ranks",
        "deepspeed-pipeline": "ZeRO stage 1, 4 ranks",
        "deepspeed-model-parallel": "ZeRO stage 2, 4 ranks",
        **dict.fromkeys(sharded.READ, "1 rank"),
        **dict.fromkeys(("dcp-of-ranks", "fsdp-of-ranks"), "2 ranks"),
    }
    if name in facts:
        run("to-fp32", path, "--dry-run")
        text = capsys.readouterr().out
        assert f"\nkind         {detection.kind.title}, {facts[name]}\n" in text
        return

    if detection.kind.is_opened:  # there is nothing to convert, and show says what lies there
        run("show", path)
        shown = capsys.readouterr().out
        assert shown.startswith(f"kind         {detection.kind.title}\n")
        assert detection.kind.remedy.format(evidence=detection.evidence) in shown
        run("to-fp32", path, "-o", tmp_path / "out", code=1)
        assert capsys.readouterr().err == f"ckpt: {refusal}\n"
        return

    lines = []
    for command in (["to-fp32", path, "-o", tmp_path / "out"], ["show", path]):
        run(*command, *options, code=1)
        lines.append(capsys.readouterr().err)
    if name == "deepspeed-several":
        assert all("is a run, not a checkpoint" in line for line in lines)
    else:
        assert lines[0] == lines[1] == f"ckpt: {refusal}\n"
    assert remedy in lines[0] and not (tmp_path / "out").exists()

    run("show", path, *options, "--json", code=1)
    assert json.loads(capsys.readouterr().err)["kind"] == detection.trouble


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.refusal])
def test_a_command_that_means_deepspeed_says_the_same(name: str, tmp_path: Path) -> None:
    path = CASES[name][0](tmp_path)
    tag = "global_step9" if name == "no-tag" else None
    with pytest.raises(CheckpointError) as error:
        zero.read(path, tag)
    with options_in_messages.using(options_in_messages.of_functions({"tag": "tag="})):
        assert str(error.value) == detect(path, tag).refusal


@pytest.mark.parametrize("name", sorted({kind.reader for kind in KINDS if kind.reader}))
def test_a_reader_of_the_table_is_one(name: str) -> None:
    function = reader(name)
    parameters = list(inspect.signature(function).parameters)
    assert parameters == ["path", "tag", "complete"]
    annotation = inspect.signature(function, eval_str=True).return_annotation
    assert issubclass(annotation, Source)


@pytest.mark.parametrize(
    "name", ["weights-tier", "slimmed", "adapter", "gathered-16bit", "accelerate", "safetensors"]
)
def test_what_needs_no_conversion_opens_as_it_is(name: str, tmp_path: Path) -> None:
    with ckpt.open(CASES[name][0](tmp_path), "np") as weights:
        assert list(weights) == ["a"] and (weights["a"] == 1).all()


@pytest.mark.parametrize("name", ["torch-bin", "fsdp-full"])
def test_files_of_torch_save_open_as_they_are(name: str, tmp_path: Path) -> None:
    path = CASES[name][0](tmp_path)
    path = path / "pytorch_model_fsdp.bin" if name == "fsdp-full" else path
    with ckpt.open(path, "np") as weights:
        assert list(weights) == ["a"] and (weights["a"] == 1).all()


@pytest.mark.parametrize(
    ("fixture", "detail"),
    [
        ("zero0-fp32", "no ZeRO (stage 0)"),
        ("zero1-bf16-w2", "ZeRO stage 1 or 2"),
        ("zero2-bf16-w2", "ZeRO stage 1 or 2"),
        ("zero3-bf16-w2", "ZeRO stage 3"),
    ],
)
def test_names_tell_the_stage_as_far_as_they_can(fixture: str, detail: str) -> None:
    assert detect(FIXTURES / fixture).detail == detail


@pytest.mark.parametrize("read", [zero.read, read_any], ids=["zero.read", "detect.read"])
def test_a_reader_in_python_names_its_argument(read: Callable[..., Source]) -> None:
    with pytest.raises(CheckpointError) as error:
        read(FIXTURES / NAME, "nope")
    assert str(error.value).endswith(
        "has no tag nope; it holds the tag global_step2: choose it with tag="
    )


@pytest.mark.parametrize("command", ["reshard --world-size 1", "to-universal"])
@pytest.mark.parametrize("name", ["dcp", "fsdp", "fsdp-full"])
def test_a_command_on_zero_names_the_one_that_takes_fsdp(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = command.split()
    run(verb, CASES[name][0](tmp_path), *options, code=1)
    assert "ckpt from-dcp makes DeepSpeed's files of it" in capsys.readouterr().err


def test_of_a_folder_of_checkpoints_the_last_one_is_named(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        tensors(tmp_path / "run" / f"step_{step}" / "model.safetensors")
    said = str(detect(tmp_path / "run").error)
    assert "it holds step_10, which is a model in safetensors" in said
    assert said.endswith(f"name {tmp_path / 'run' / 'step_10'}")


def test_of_a_folder_of_no_known_kind_it_is_said_what_lies_in_its_folders(tmp_path: Path) -> None:
    tensors(tmp_path / "checkpoints" / "checkpoint_0" / "model.safetensors")
    said = str(detect(tmp_path).error)
    assert "holds no checkpoint; it holds checkpoints/ (checkpoint_0): name" in said


def test_a_link_named_latest_to_a_folder_is_no_pointer_of_deepspeed(tmp_path: Path) -> None:
    dcp(tmp_path / "step-5")
    (tmp_path / "latest").symlink_to("step-5")
    assert detect(tmp_path).kind.name == "parent"


def test_weights_come_before_states_that_nothing_points_to_where_weights_are_opened(
    tmp_path: Path,
) -> None:
    shutil.copytree(next((FIXTURES / NAME).glob("global_step*")), tmp_path, dirs_exist_ok=True)
    tensors(tmp_path / "model.safetensors")
    assert detect(tmp_path).kind.name == "deepspeed"
    with ckpt.open(tmp_path, "np") as weights:
        assert list(weights) == ["a"]


def test_nothing_is_executed_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "c" / "global_step5"
    folder.mkdir(parents=True)
    torch.save(Evil(), folder / "mp_rank_00_model_states.pt")
    (tmp_path / "c/latest").write_text("global_step5")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from converters.detect import detect\n"
        f"print(detect(Path({str(tmp_path / 'c')!r})).kind.name)\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'converters.pickles'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "deepspeed\n[]\n"
    assert not (tmp_path / "ran").exists()


def test_the_kind_is_in_json_and_in_the_first_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("show", FIXTURES / NAME)
    assert capsys.readouterr().out.startswith("kind         DeepSpeed checkpoint\n")
    run("show", FIXTURES / NAME, "--json")
    assert json.loads(capsys.readouterr().out)["kind"] == "deepspeed"
    run("to-fp32", FIXTURES / NAME, "-o", tmp_path / "m", "--json")
    assert json.loads(capsys.readouterr().out)["source"]["kind"] == "deepspeed"


def test_a_source_says_what_it_is_in_one_line() -> None:
    source = zero.read(FIXTURES / NAME)
    assert re.fullmatch(r"<Checkpoint '.*global_step\d+': 20 tensors>", repr(source))


def test_the_docs_show_the_table() -> None:
    page = (ROOT / "docs/inputs.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| `[\w-]+` \|", line)]
    assert rows == [row(kind.name) for kind in KINDS]


def row(name: str) -> str:
    """A kind's row in the page."""
    kind = BY_NAME[name]
    answer = kind.reason("...") or kind.sentence("...", "...").replace(", not ...", "")
    return f"| `{kind.name}` | {kind.title} | {kind.recognized_by} | {answer} |"


def test_a_folder_of_checkpoints_is_as_unsupported_as_what_it_holds(tmp_path: Path) -> None:
    dcp(tmp_path / "step-5")
    assert detect(tmp_path).error.kind == detect(tmp_path / "step-5").error.kind == "unsupported"


def test_a_universal_source_is_of_the_kind_that_is_detected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-universal", FIXTURES / "zero2-bf16-w2", "-o", tmp_path / "u")
    capsys.readouterr()
    run("from-universal", tmp_path / "u", "--world-size", "1", "--dry-run", "--json")
    kind = json.loads(capsys.readouterr().out)["source"]["kind"]
    assert kind == detect(tmp_path / "u").kind.name == "deepspeed-universal"


@pytest.mark.parametrize("call", ["Saver", "find"])
def test_a_call_outside_of_a_training_is_no_damage(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a launcher; one process needs no group
    with pytest.raises(CheckpointError, match=f"{call}: torch.distributed is not init") as error:
        RankGroup(call, 1.0)
    assert error.value.kind == "refused"


def test_what_cannot_be_opened_is_told_what_to_name(tmp_path: Path) -> None:
    folder = tensors(tmp_path / "parent" / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"name {folder}$") as raised:
        ckpt.open(folder.parent)
    assert "nothing to convert" not in str(raised.value)

    part = dcp(tmp_path / "dcp") / "__0_0.distcp"
    with pytest.raises(CheckpointError, match=f"the checkpoint is its folder: {part.parent}"):
        ckpt.open(part)


def test_only_what_reads_a_file_of_weights_asks_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = touch(tmp_path, "notes") / "notes"
    with pytest.raises(CheckpointError, match="a checkpoint, or a file of weights"):
        ckpt.open(path)
    for command in ("to-fp32", "show", "verify"):
        run(command, path, code=1)
        assert "a file of weights" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "to-fp32", "push"])
@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("one.safetensors", 0, "is empty; copy it again"),
        ("one.safetensors", 5, "has 5 bytes, too few for a safetensors file; copy it again"),
        ("one.safetensors", 40, "is cut short, or not in safetensors"),
        ("one.safetensors", -3, "its tensors take 12 bytes, 9 follow it; copy it again"),
        ("one.bin", 0, "is empty; copy it again"),
        ("one.bin", -200, "is damaged or cut short"),
    ],
)
def test_a_file_of_weights_that_is_not_whole_is_not_called_readable(
    command: str,
    name: str,
    size: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if path.suffix == ".bin":
        torch.save({"a": torch.ones(3)}, path)
    else:
        tensors(path)
    path.write_bytes(path.read_bytes()[:size])
    more = ["org/name", "--dry-run"] if command == "push" else []
    run(command, path, *more, code=1)
    line = capsys.readouterr().err
    assert words in line and "ckpt.open" not in line and "publishes it" not in line


def test_a_model_whose_shard_is_missing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors(tmp_path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {f"{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    run("show", tmp_path, code=1)
    line = capsys.readouterr().err
    assert "model-00002-of-00002.safetensors is missing" in line and "ckpt.open" not in line


def test_a_file_is_what_it_holds_and_not_what_it_is_named(tmp_path: Path) -> None:
    tensors(tmp_path / "one.safetensors")
    torch.save({"a": torch.ones(3)}, tmp_path / "two.safetensors")
    for name in ("b1f9c2", "pytorch_model.bin", "x.ckpt"):  # the first as in the Hub's cache
        shutil.copy(tmp_path / "one.safetensors", tmp_path / name)
        if name != "pytorch_model.bin":
            assert list(ckpt.open(tmp_path / name)) == ["a"]
    with pytest.raises(CheckpointError, match=r"is a zip, .* a name that ends in .bin"):
        ckpt.open(tmp_path / "two.safetensors")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "b/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"is in safetensors, .* ends in .safetensors"):
        ckpt.open(tmp_path / "b")


def test_a_program_of_torch_is_called_so(tmp_path: Path) -> None:
    program = torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2))
    torch.jit.save(program, tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match=r"is a program of TorchScript, .*torch.jit.load"):
        ckpt.open(tmp_path / "program.pt")


def test_an_archive_is_unpacked_from_where_the_user_stands() -> None:
    for path, command in (
        ("c.tgz", "tar xf c.tgz"),
        ("my run/c.tgz", "tar xf 'my run/c.tgz' -C 'my run'"),
        ("run/c.zip", "unzip run/c.zip -d run"),
        ("run/c.gz", "gunzip -k run/c.gz"),
    ):
        assert filenames.unpacking(PurePath(path)) == f"unpack it first ({command})"
