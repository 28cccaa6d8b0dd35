"""Hostile files in place of real ones: refused with one line, nothing run, and within limits."""

from __future__ import annotations

import gc
import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from faults.forks import Forks
from hardening import hostile
from hardening.hostile import archives, files, gathered, lies
from hardening.hostile.files import Hostile
from hardening.hostile.judging import Target
from hardening.hostile.opcodes import asked, encoded, pickled
from hardening.hostile.payloads import PAYLOADS
from hardening.scenes import called

from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.pickles import denylist, interpreter, values
from converters.torch_files import reader, rebuild


@pytest.fixture(scope="module", autouse=True)
def rest_of_the_run_is_not_collected() -> Iterator[None]:
    """A bomb makes a million objects: at each of its collections all modules would be walked."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def require(target: Target, hostiles: Iterable[Hostile], canary: Path) -> set[str]:
    """Each is refused, in 2 s of the processor and 64 MiB; returns those that may be accepted."""
    verdicts = [target.judge(each) for each in hostiles]
    found = [verdict.wrong(canary) for verdict in verdicts]
    assert not [line for line in found if line is not None]
    assert len(found) > 10
    return {verdict.hostile.name for verdict in verdicts if verdict.answer == "right"}


def test_no_callable_no_form_and_no_container_runs_anything(tmp_path: Path) -> None:
    target, real = hostile.target("model states", tmp_path / "t")
    require(target, files.every_code(real, tmp_path / "canary"), tmp_path / "canary")


@pytest.mark.parametrize("place", [place for place in hostile.PLACES if place != "model states"])
def test_a_sample_of_all_combinations_is_refused_in_every_place(place: str, tmp_path: Path) -> None:
    target, real = hostile.target(place, tmp_path / "t")
    require(target, files.codes(real, tmp_path / "canary", 7, 60), tmp_path / "canary")


@pytest.mark.parametrize(("place", "first"), [("model states", 0), ("stage 3 optimizer states", 1)])
def test_zip_tricks_and_tensor_lies_are_refused(place: str, first: int, tmp_path: Path) -> None:
    """Each in one of two places; harden.py has all in all places."""
    target, real = hostile.target(place, tmp_path / "t")
    told = itertools.chain(files.zips(real), files.tensors(real), files.damaged_numbers(real))
    require(target, itertools.islice(told, first, None, 2), tmp_path / "canary")


def test_bombs_are_refused_in_2_s_and_64_mib(tmp_path: Path) -> None:
    target, real = hostile.target("optimizer states", tmp_path / "t")
    bombs = files.sampled_bombs(real)  # harden.py has all
    accepted = require(target, bombs, tmp_path / "canary")
    assert {name.partition(",")[0] for name in accepted} <= {"surrogates"}


def test_numbers_and_texts_of_honest_files_are_taken_as_torch_takes_them(tmp_path: Path) -> None:
    """What is accepted is no lie: docs/security.md lists it."""
    import torch

    from ckpt.weights.opening.opened import open as opened

    target, real = hostile.target("model states", tmp_path / "t")
    told = [*files.bombs(real, files.HONEST), *files.damaged_numbers(real)]
    accepted = require(target, told, tmp_path / "canary")
    assert {name.partition(",")[0] for name in accepted} == files.HONEST
    for each in (each for each in told if each.name in accepted):
        target.path.write_bytes(each.data)
        theirs = torch.load(target.path, weights_only=False)
        ours = reader.read(target.path).root
        for key in ("global_steps", "dp_world_size", "client", "buffer_names"):
            assert theirs.get(key) == ours.get(key)
        opened(target.folder)


def test_a_key_that_stands_twice_counts_with_its_last_value_as_in_torch(tmp_path: Path) -> None:
    import torch

    target, real = hostile.target("model states", tmp_path / "t")
    twice = b"K\x07s" + encoded("global_steps", 2) + b"K\x09"
    target.path.write_bytes(real.holding("global_steps", twice))
    theirs = torch.load(target.path, weights_only=False)["global_steps"]
    assert reader.read(target.path).root["global_steps"] == theirs == 9


def test_a_wrong_crc32_of_what_no_weight_needs_is_found_by_verify(tmp_path: Path) -> None:
    target, real = hostile.target("optimizer states", tmp_path / "t")
    (wrong,) = (each for each in files.zips(real) if each.name == "central crc wrong")
    assert wrong.inert and target.judge(wrong).answer == "right"
    code, said = called("verify", "--data", target.folder)
    assert code == 1, said


def test_safetensors_that_lie_prove_nothing_and_harm_nothing(tmp_path: Path) -> None:
    verdicts = list(gathered.verdicts(tmp_path / "g", large=False))
    found = [verdict.wrong(tmp_path / "canary") for verdict in verdicts]
    assert not [line for line in found if line is not None]
    assert len(found) > 60


def test_600_000_empty_tensors_and_a_header_of_100_mb_are_refused_at_once(tmp_path: Path) -> None:
    for name, data in lies.large():
        if name in ("600,000 empty tensors", "header of 100 MB", "header of 20 MB of lists"):
            verdict = gathered.opened(Hostile("safetensors", name, data), tmp_path / "x")
            assert verdict.wrong(tmp_path / "canary") is None, verdict.message


RUN = """
import pickle, sys
try:
    pickle.loads(open(sys.argv[1], "rb").read())
except BaseException:
    pass
"""


@pytest.mark.parametrize("form", ["REDUCE", "STACK_GLOBAL", "INST", "OBJ", "BUILD", "DICT_KEY"])
def test_the_payloads_are_live_where_a_pickle_is_loaded(form: str, tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    opcodes = asked(PAYLOADS["os.system"](tmp_path / "canary"), form, 2)
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + opcodes + b".")
    subprocess.run([sys.executable, "-c", RUN, tmp_path / "x.pkl"], check=True, timeout=60)
    assert (tmp_path / "canary").exists()


def hostile_example(name: str, canary: Path, real: files.Template) -> bytes:
    """A file of each kind, by its name."""
    if name == "code":
        call = asked(PAYLOADS["subprocess.Popen"](canary), "STACK_GLOBAL", 4)
        return real.holding("client", call)
    if name == "bomb":
        return real.holding("param_shapes", lies.bombs()["tuples doubled by the memo"])
    if name == "escape codes":
        return real.holding("module", lies.bombs()["escape codes in a name"])
    if name == "zip":
        return archives.tricks(real.entries)["duplicate record"]
    return next(files.tensors(real)).data


LIMITED = """
import resource, sys
import ckpt.cli.main, ckpt.weights.conversion.convert, ckpt.cli.conversion
import converters.zero.checkpoint, converters.cast
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (192 << 20),) * 2)
ckpt.cli.main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", ["code", "bomb", "escape codes", "zip", "tensor"])
def test_the_command_refuses_in_one_line_and_leaves_nothing(
    name: str, forks: Forks, tmp_path: Path
) -> None:
    target, real = hostile.target("model states", tmp_path / "t")
    target.path.write_bytes(hostile_example(name, tmp_path / "canary", real))
    for command in (["show"], ["to-fp32", "-o", str(tmp_path / "out")]):
        args = [command[0], str(target.folder), *command[1:]]
        ended = forks.run(args, tmp_path, code=LIMITED)
        assert ended.status == 1 and not ended.printed, ended
        assert ended.said.startswith("ckpt: ") and ended.said.isprintable(), ended.said
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "canary").exists()


def interpret(data: bytes) -> object:
    return interpreter.Interpreter(data, rebuild.BUILDERS, lambda pid: pid, "x.pt").run()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("argparse", "Namespace"),
        ("builtins", "getattr"),
        ("collections", "deque"),
        ("datetime", "timedelta"),
        ("functools", "partial"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("os", "stat_result"),
        ("pathlib", "PosixPath"),
        ("signal", "Signals"),
        ("torch", "device"),
        ("my.code", "Model"),
        ("train", "eval"),
    ],
)
def test_what_honest_states_name_is_carried_along(module: str, name: str) -> None:
    found = interpret(f"\x80\x02c{module}\n{name}\n)R.".encode("latin-1"))
    assert isinstance(found, values.Call) and str(found.of) == f"{module}.{name}"


def test_getattr_of_an_enum_is_carried_and_of_a_module_refused() -> None:
    start = b"cbuiltins\ngetattr\n(cenums\nColor\n"
    assert isinstance(interpret(start + b"X\x03\0\0\0REDtR."), values.Call)
    for name in (b"system", b"__globals__", b"os.path", b"__init__.__globals__"):
        with pytest.raises(CheckpointError, match="would run code") as error:
            interpret(start + b"X" + len(name).to_bytes(4, "little") + name + b"tR.")
        assert error.value.kind == "refused"


def test_every_callable_of_the_generator_is_on_the_list() -> None:
    for name, payload in PAYLOADS.items():
        with pytest.raises(CheckpointError, match="would run code"):
            interpret(pickled(payload(Path("/nowhere")), 2))
        assert name
    assert not denylist.runs_code("torch._utils", "_rebuild_tensor_v2")


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    target, _ = hostile.target("model states", tmp_path / "t")
    target.path.unlink()
    os.mkfifo(target.path)
    with pytest.raises(CheckpointError, match="is not a plain file"):
        reader.read(target.path)


@pytest.mark.parametrize("name", [".", "..", "", "a/b", "/etc/passwd", "a\\u0000b"])
def test_an_index_that_names_what_is_no_shard_is_refused(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    with pytest.raises(CheckpointError, match="outside its folder"):
        safetensors.read(tmp_path)


def test_a_pickle_loaded_by_python_itself_is_what_we_encode() -> None:
    for protocol in range(6):
        value = {"a": [1, (2, None)], "b": True}
        assert pickle.loads(pickled(value, protocol)) == value
