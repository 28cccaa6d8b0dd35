"""The output as a model folder, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, ROOT, convert, live, run, same, weights_in

from ckpt.weights.conversion import convert as conversion
from ckpt.weights.conversion import task
from converters.errors import CheckpointError
from converters.execute import shards
from converters.execute import workers as mover
from converters.execute.workers import Mover, Worker
from converters.storage import local, stores
from converters.storage.checksums import Ledger
from converters.storage.store import File

TRAINER = FIXTURES / "trainer-zero2/checkpoint-2"
SOURCE = FIXTURES / "zero2-bf16-w3"


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["trainer-zero2", "trainer-zero3"])
@pytest.mark.parametrize(
    "options",
    [(), ("--dtype", "bf16"), ("--format", "bin"), ("--max-shard-size", "5KB"), ("--tied", "keep")],
    ids=" ".join,
)
def test_from_pretrained_loads_the_folder_without_a_warning(
    name: str, options: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(FIXTURES / name / "checkpoint-2", tmp_path / "model", *options)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    wanted = torch.bfloat16 if "bf16" in options else torch.float32
    assert model.dtype == wanted
    assert AutoTokenizer.from_pretrained(tmp_path / "model")
    state = model.state_dict()
    for key, value in live(FIXTURES / name)["fp32"].items():
        assert same(state[key], value.to(wanted)), key


def test_the_folder_holds_what_a_model_needs_and_no_training_state(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-2"
    shutil.copytree(TRAINER, source)
    wanted = {
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "modeling_mine.py",
        "tokenizer.model",
    }
    config = json.loads((source / "config.json").read_text())
    auto_map = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (source / "config.json").write_text(json.dumps(config | auto_map))
    unwanted = {
        "optimizer.pt",
        "secrets_local.py",
        "zero_to_fp32.py",
        "README.private",
        "scaler.pt",
        "notes.txt",
    }
    for name in wanted | unwanted:
        (source / name).write_text("x")
    run("to-fp32", source)
    written = set(files_in(tmp_path / "checkpoint-2-fp32"))
    standard = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "conversion.json",
    }
    assert written == wanted | standard
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("dtype", "said"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_json_says_the_type_that_was_written(
    key: str, dtype: str, said: str, tmp_path: Path
) -> None:
    source = tmp_path / "c"
    shutil.copytree(TRAINER, source)
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    config[key] = "bfloat16"
    config["vision_config"] = {key: "float64", "hidden_size": 3}
    (source / "config.json").write_text(json.dumps(config))
    run("to-fp32", source, "-o", tmp_path / "m", "--dtype", dtype)
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert written == config | {key: said, "vision_config": {key: said, "hidden_size": 3}}


def test_tied_weights_are_written_once_where_the_config_ties_them(tmp_path: Path) -> None:
    found = convert(TRAINER, tmp_path / "m")
    assert "lm_head.weight" not in found
    record = json.loads((tmp_path / "m/conversion.json").read_text())
    assert record["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    again = convert(TRAINER, tmp_path / "k", "--tied", "keep")
    assert same(again["lm_head.weight"], again["model.embed_tokens.weight"])
    assert "head.weight" in convert(SOURCE, tmp_path / "plain")  # no config: every name


def test_the_record_tells_where_the_weights_come_from(tmp_path: Path) -> None:
    convert(TRAINER, tmp_path / "m")
    record = json.loads((tmp_path / "m/conversion.json").read_text())
    assert record["source"]["tag"] == "global_step2" and record["source"]["step"] == 2
    assert record["source"]["deepspeed"] == "0.19.8" and record["dtype"] == "fp32"
    for entry in record["source"]["files"]:
        assert (TRAINER / entry["name"]).stat().st_size == entry["size"]
        assert len(entry["directory_sha256"]) == 64
    assert str(ROOT) not in json.dumps(record)


def test_bytes_do_not_depend_on_workers_or_on_the_run(tmp_path: Path) -> None:
    outputs = []
    for number, workers in enumerate((1, 2, 5)):
        folder = tmp_path / str(number)
        run("to-fp32", SOURCE, "-o", folder, "--workers", workers, "--max-shard-size", "1KB")
        outputs.append(files_in(folder))
    assert outputs[0] == outputs[1] == outputs[2]


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shard", [0, 2])
def test_an_interrupted_conversion_leaves_nothing_finished_and_continues(
    format: str, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(name: str) -> task.Conversion:
        return conversion.prepare(
            SOURCE,
            tmp_path / name,
            max_shard_size=500,
            format=format,  # type: ignore[arg-type]
        )

    moved = []
    move = mover.Mover.move

    def stop(self: mover.Mover, *args: object) -> None:
        moved.append(args[1])
        if len(moved) == shard + 1:
            raise Stopped
        move(self, *args)  # type: ignore[arg-type]

    conversion.run(prepare("whole"))
    monkeypatch.setattr(mover.Mover, "move", stop)
    with pytest.raises(Stopped):
        conversion.run(prepare("torn"))
    assert not (tmp_path / "torn").exists()
    left = tmp_path / ".torn.partial"
    if not shard:
        assert not left.exists()
        return
    assert len([p for p in left.iterdir() if p.suffix == f".{format}"]) == shard
    monkeypatch.setattr(mover.Mover, "move", move)
    kept = {p.name: p.stat().st_mtime_ns for p in left.glob(f"*.{format}")}
    conversion.run(prepare("torn"))
    assert files_in(tmp_path / "torn") == files_in(tmp_path / "whole")
    for name, time_ns in kept.items():
        assert (tmp_path / "torn" / name).stat().st_mtime_ns == time_ns
    assert not left.exists()


def test_leftovers_of_another_plan_are_not_used(tmp_path: Path) -> None:
    left = tmp_path / ".m.partial"
    left.mkdir()
    whole = convert(SOURCE, tmp_path / "whole")
    size = (tmp_path / "whole/model.safetensors").stat().st_size
    (left / "model.safetensors").write_bytes(b"\0" * size)
    (left / "plan.json").write_text("another")
    found = convert(SOURCE, tmp_path / "m")
    assert all(same(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("at", [9, -5], ids=["header", "data"])
def test_a_shard_that_was_damaged_meanwhile_is_written_again(
    format: str, at: int, tmp_path: Path
) -> None:
    def prepare(name: str) -> task.Conversion:
        return conversion.prepare(SOURCE, tmp_path / name, format=format)  # type: ignore[arg-type]

    conversion.run(prepare("whole"))
    planned = prepare("m")
    left = tmp_path / ".m.partial"
    shutil.copytree(tmp_path / "whole", left)
    (left / "plan.json").write_text(planned.plan.digest())
    shard = left / planned.plan.shards[0].filename
    data = bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)
    conversion.run(planned)
    assert files_in(tmp_path / "m") == files_in(tmp_path / "whole")


def test_what_one_thread_finds_damaged_no_other_thread_takes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = conversion.prepare(SOURCE, tmp_path / "m")
    shard = planned.plan.shards[0]
    first, second = sorted(placement.offset for placement in shard.placements)[:2]
    (tmp_path / "left").write_bytes(bytes(shard.nbytes))
    begun = threading.Event()

    def is_there(worker: Worker, file: File, offset: int, output: memoryview) -> bool:
        """The second is looked at before the first is found damaged, and found whole after it."""
        if offset == second:
            begun.set()
            end = time.monotonic() + 10
            while not worker.mover.stale and time.monotonic() < end:
                time.sleep(0.001)
        elif offset == first:
            assert begun.wait(10)
        return offset != first

    monkeypatch.setattr(Worker, "is_there", is_there)
    moving = Mover(True, Ledger(), set(), lambda _: None)
    with stores.opened(tmp_path / "left") as file:
        moving.compare(shard, file, 2)
    assert moving.stale


def test_a_killed_conversion_continues(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ckpt", "to-fp32", SOURCE, "-o", tmp_path / "m"]
    command += ["--max-shard-size", "300B"]
    slow = "import time, converters.execute.workers as m; f = m.Mover.move\n"
    slow += "m.Mover.move = lambda *a: (time.sleep(0.1), f(*a))[1]\n"
    slow += "from ckpt.cli.main import main; main()"
    child = subprocess.Popen([sys.executable, "-c", slow, *command[3:]], cwd=ROOT)
    left = tmp_path / ".m.partial"
    deadline = time.monotonic() + 60
    while len(list(left.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "m").exists()
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    whole = convert(SOURCE, tmp_path / "whole", "--max-shard-size", "300B")
    assert weights_in(tmp_path / "m").keys() == whole.keys()
    assert files_in(tmp_path / "m") == files_in(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on_and_exits_130(tmp_path: Path) -> None:
    slow = "import itertools, time, converters.execute.workers as m\n"
    slow += "f, n = m.Mover.move, itertools.count()\n"
    slow += "m.Mover.move = lambda *a: (time.sleep(60 if next(n) else 0), f(*a))[1]\n"
    slow += "from ckpt.cli.main import main; main()"
    args = ["to-fp32", SOURCE, "-o", tmp_path / "m", "--max-shard-size", "300B"]
    child = subprocess.Popen(
        [sys.executable, "-c", slow, *args],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # & and nohup ignore it
    )
    left = tmp_path / ".m.partial"
    deadline = time.monotonic() + 60
    while not list(left.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.splitlines()[-1].endswith("the same command continues where it stopped")
    assert not (tmp_path / "m").exists() and not list(left.glob("*.partial"))


def test_an_output_that_exists_is_replaced_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(SOURCE, tmp_path / "m")
    (tmp_path / "m/mine.txt").write_text("kept")
    run("to-fp32", SOURCE, "-o", tmp_path / "m", code=1)
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "m/mine.txt").read_text() == "kept"
    (tmp_path / "m/mine.txt").unlink()
    run("to-fp32", SOURCE, "-o", tmp_path / "m", "--overwrite", "--dtype", "bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    (tmp_path / "empty").mkdir()
    convert(SOURCE, tmp_path / "empty")


def test_two_conversions_never_write_the_same_output(tmp_path: Path) -> None:
    planned = conversion.prepare(SOURCE, tmp_path / "m")
    staging = tmp_path / ".m.partial"
    staging.mkdir()
    with open(staging / "plan.json", "wb") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is in use"):
            conversion.run(planned)


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "free_space", lambda _: 100)
    with pytest.raises(CheckpointError, match="has 100 bytes free, the output needs") as raised:
        conversion.run(conversion.prepare(SOURCE, tmp_path / "m"))
    assert raised.value.kind == "output"
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_itself_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "c"
    shutil.copytree(SOURCE, source)
    tag = source / "global_step2"
    for output in (source, tag, tmp_path, tag / ".."):
        run("to-fp32", source, "-o", output, "--overwrite", code=1)
        assert "holds the checkpoint itself" in capsys.readouterr().err
    assert files_in(source).keys() == files_in(SOURCE).keys()
    for output in ("/", "", "."):
        run("to-fp32", source, "-o", output, code=1)
        assert capsys.readouterr().err.startswith("ckpt: ")


@pytest.mark.parametrize("option", ["--config", "--tokenizer", "--base", "--adapter-config"])
@pytest.mark.parametrize("inner", ["", "inner"])
def test_a_folder_that_an_option_names_is_never_overwritten(
    option: str, inner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "donor" / inner
    named.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (named / name).write_text("{}")
    before = files_in(named)
    output = tmp_path / "donor"
    run("to-fp32", SOURCE, "-o", output, "--overwrite", option, named, code=1)
    said = capsys.readouterr().err
    assert f"which {option} names, and the output would replace it" in said
    assert files_in(named) == before


@pytest.mark.parametrize("call", ["pwritev", "fsync", "replace"])
def test_a_disk_that_fails_leaves_nothing_finished(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        conversion.run(conversion.prepare(SOURCE, tmp_path / "m"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    conversion.run(conversion.prepare(SOURCE, tmp_path / "m"))


def test_kernels_without_uncached_writes_are_served_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def old(fd: int, buffers: list, offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(95, "Operation not supported")
        return real(fd, buffers, offset)

    whole = convert(SOURCE, tmp_path / "whole")
    monkeypatch.setattr(os, "pwritev", old)
    found = convert(SOURCE, tmp_path / "m")
    assert all(same(found[name], whole[name]) for name in whole)


def test_fp16_overflow_is_an_error_with_the_tensors_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "c"
    shutil.copytree(FIXTURES / "zero0-fp32", source)
    path = source / "global_step2/mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["module"]["norm.weight"].view(-1)[1] = 1e6
    torch.save(state, path)
    run("to-fp32", source, "-o", tmp_path / "m", "--dtype", "fp16", code=1)
    said = capsys.readouterr().err
    assert "1 value of norm.weight is too large for F16" in said
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".*"))
    found = convert(source, tmp_path / "m", "--dtype", "fp16", "--allow-overflow")
    assert found["norm.weight"].isinf().sum() == 1
    assert "1 value of norm.weight became infinite" in capsys.readouterr().err


def test_a_plan_is_executed_without_the_folder_around_it(tmp_path: Path) -> None:
    planned = conversion.prepare(SOURCE, tmp_path / "m")
    report = shards.execute(planned.plan, tmp_path, shards.CheckOptions(verify=False))
    assert report.written == planned.plan.nbytes and report.checked == 0
