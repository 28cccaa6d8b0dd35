"""A checkpoint under a URL: found, shown, opened and converted from a store that is registered.

The store is in memory, and its scheme is made up. Each result is compared with that of the
same files on this disk, byte for byte; no event of ``sys.addaudithook`` names the URL, or a
local copy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kind_cases import CASES
from made_checkpoints import make_checkpoint
from memory_store import MemoryStore
from oracles import FIXTURES, convert, run, same
from stock_checkpoints import with_model_of_another

import ckpt
from converters.detect import detect
from converters.errors import CheckpointError
from converters.storage import stores
from converters.storage.url_path import UrlPath, absolute
from tests.support.store_suite import Place, StoreSuite

SCHEME = "made-up"
URL = f"{SCHEME}://bucket/run"
EVENTS: list[str] | None = None  # what is opened or listed, while somebody looks


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store in the table, for one test."""
    memory_store = MemoryStore()
    monkeypatch.setitem(stores.STORES, SCHEME, memory_store)
    return memory_store


@pytest.fixture(scope="module")
def audited() -> None:
    def note(event: str, arguments: tuple[object, ...]) -> None:
        if EVENTS is not None and event in ("open", "os.listdir", "os.scandir", "os.mkdir"):
            EVENTS.append(str(arguments[0]))

    sys.addaudithook(note)  # for good: none can be taken away again


@pytest.fixture
def events(audited: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The local paths that are opened or listed in the test."""
    paths: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "EVENTS", paths)
    yield paths


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def place(self, store: MemoryStore) -> Place:
        return Place(store, URL)


def adapter_checkpoint(folder: Path) -> Path:
    """A checkpoint of two ranks with a LoRA adapter, and its configuration beside."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    parameters = {
        f"{module}.lora_A.default.weight": torch.randn(2, 8),
        f"{module}.lora_B.default.weight": torch.randn(8, 2),
    }
    make_checkpoint(folder, parameters)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by name; of conversion.json no words, which are the asker's."""
    files = (path for path in folder.rglob("*") if path.is_file())
    by_name = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    if "conversion.json" in by_name:
        record = json.loads(by_name["conversion.json"])
        words = dict.fromkeys(("notes", "verdict", "rules"))
        by_name["conversion.json"] = json.dumps(record | words).encode()
    return by_name


def require_same(tmp_path: Path, source: Path, *command: Any) -> None:
    """Runs a command on a local folder and on the URL, and compares what they write."""
    name, *options = command
    run(name, source, "-o", tmp_path / "local", *options)
    if EVENTS is not None:
        EVENTS.clear()
    run(name, URL, "-o", tmp_path / "remote", *options)

    local_files, remote_files = contents(tmp_path / "local"), contents(tmp_path / "remote")
    assert local_files.keys() == remote_files.keys() and local_files
    for files in (local_files, remote_files):  # it names the folder that was read
        record = json.loads(files.pop("rewriting.json", b"{}"))
        assert not record or record["source"]["name"]
    assert [n for n in local_files if local_files[n] != remote_files[n]] == []


def require_apart(events: list[str], *sources: Path) -> None:
    """No local file was opened in the place of one of the store."""
    assert [path for path in events if SCHEME in path] == []
    assert [path for path in events if any(str(source) in path for source in sources)] == []


@pytest.mark.parametrize("kind", ["fsdp", "dcp-of-ranks", "fsdp-of-ranks"])
def test_a_checkpoint_of_fsdp_is_converted(
    kind: str, store: MemoryStore, events: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    source = CASES[kind][0](folder)
    store.put_folder(source, URL)
    require_same(tmp_path, source, "to-fp32")
    require_apart(events, source)


@pytest.mark.parametrize("name", ["zero2-bf16-w4", "zero3-bf16-w4", "trainer-zero3/checkpoint-2"])
def test_a_zero_checkpoint_is_converted(
    name: str, store: MemoryStore, events: list[str], tmp_path: Path
) -> None:
    source = FIXTURES / name
    store.put_folder(source, URL)
    require_same(tmp_path, source, "to-fp32")
    require_apart(events, source)
    assert any(store.requests["open", url] for url in store.files if url.endswith("_states.pt"))


def test_weights_and_single_files_are_shown(
    store: MemoryStore, events: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / "trainer-zero2/checkpoint-2"
    store.put_folder(source, URL)
    for name in ("model.safetensors", "scheduler.pt", "global_step2/mp_rank_00_model_states.pt"):
        run("show", source / name, "--tensors")
        local = capsys.readouterr().out.replace(str(source), URL)
        events.clear()
        run("show", f"{URL}/{name}", "--tensors")
        assert capsys.readouterr().out == local
        require_apart(events, source)


@pytest.mark.parametrize("name", ["zero2-bf16-w4", "zero3-bf16-w4"])
def test_a_plan_asks_for_few_runs_of_each_state_file(name: str, store: MemoryStore) -> None:
    """Not for one a tensor: of each of its two forms the end, the directory and the headers."""
    store.put_folder(FIXTURES / name, URL)
    ckpt.reshard.plan(URL, 8, output="out")
    state_files = [url for url in store.files if url.endswith("_states.pt")]
    assert {store.requests["open", url] for url in state_files} == {1}
    assert max(store.requests["read", url] for url in state_files) <= 18


def test_a_checkpoint_may_fill_a_bucket(store: MemoryStore, tmp_path: Path) -> None:
    store.put_folder(FIXTURES / "zero2-bf16-w4", f"{SCHEME}://bucket")
    expected = convert(FIXTURES / "zero2-bf16-w4", tmp_path / "local")
    run("to-fp32", f"{SCHEME}://bucket", "-o", tmp_path / "remote")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local") and expected


def test_a_conversion_goes_on_where_it_stopped(store: MemoryStore, tmp_path: Path) -> None:
    store.put_folder(FIXTURES / "zero2-bf16-w4", URL)
    conversion = ckpt.convert.plan(URL, tmp_path / "out", max_shard_size="1KB")
    stopped = conversion.plan.shards[1].filename

    def stop(nbytes: int) -> None:
        if (tmp_path / ".out.partial" / stopped).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckpt.convert.execute(conversion, progress=stop)
    assert (tmp_path / ".out.partial" / stopped).exists()
    ckpt.convert.execute(conversion)
    convert(FIXTURES / "zero2-bf16-w4", tmp_path / "local", "--max-shard-size", "1KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize("name", ["zero2-bf16-w4", "zero3-bf16-w4"])
@pytest.mark.parametrize(
    "command",
    [("reshard", "--world-size", "3"), ("reshard", "--world-size", "2", "--stage", "1")],
    ids=["same stage", "another stage"],
)
def test_a_zero_checkpoint_is_resharded(
    name: str, command: tuple[str, ...], store: MemoryStore, events: list[str], tmp_path: Path
) -> None:
    store.put_folder(FIXTURES / name, URL)
    require_same(tmp_path, FIXTURES / name, *command)
    require_apart(events, FIXTURES / name)


def test_the_model_file_of_another_training_is_found_by_few_looks(
    store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put_folder(with_model_of_another(tmp_path / "checkpoint-2"), URL)
    run("reshard", URL, "--world-size", "1", "-o", tmp_path / "new", code=1)
    message = capsys.readouterr().err
    assert (
        "mp_rank_00_model_states.pt holds other values of " in message and "--no-verify" in message
    )


@pytest.mark.parametrize("name", ["zero2-bf16-w4", "zero3-bf16-w4"])
def test_the_universal_format_is_made_and_read(
    name: str, store: MemoryStore, events: list[str], tmp_path: Path
) -> None:
    store.put_folder(FIXTURES / name, URL)
    require_same(tmp_path, FIXTURES / name, "to-universal")
    require_apart(events, FIXTURES / name)

    store.files.clear()
    store.put_folder(tmp_path / "remote", URL)
    store.requests.clear()
    (tmp_path / "again").mkdir()
    require_same(tmp_path / "again", tmp_path / "local", "from-universal", "--world-size", "2")
    require_apart(events, tmp_path / "local")

    listings = sum(n for (call, _), n in store.requests.items() if call in ("entries", "list"))
    assert listings < 30  # not one for each parameter


def test_a_checkpoint_of_torch_is_made_and_read(
    store: MemoryStore, events: list[str], tmp_path: Path
) -> None:
    source = FIXTURES / "zero2-bf16-w2"
    store.put_folder(source, URL)
    require_same(tmp_path, source, "to-dcp")
    require_apart(events, source)

    store.files.clear()
    store.put_folder(tmp_path / "remote", URL)
    (tmp_path / "again").mkdir()
    options = ("--world-size", "2", "--stage", "2")
    require_same(tmp_path / "again", tmp_path / "local", "from-dcp", *options)
    require_apart(events, tmp_path / "local")


def test_an_adapter_is_taken_from_a_training(
    store: MemoryStore, events: list[str], tmp_path: Path
) -> None:
    source = adapter_checkpoint(tmp_path / "source")
    store.put_folder(source, URL)
    require_same(tmp_path, source, "to-fp32")
    require_apart(events, source)
    with ckpt.open(URL) as weights:
        assert len(weights.adapter) == 2


def test_weights_are_opened_and_shown(
    store: MemoryStore, events: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    convert(FIXTURES / "zero2-bf16-w4", model, "--max-shard-size", "1KB")
    convert(adapter_checkpoint(tmp_path / "source"), adapter)
    pickled = tmp_path / "pickled"
    convert(FIXTURES / "zero2-bf16-w4", pickled, "--format", "bin")

    for source in (model, adapter, pickled, FIXTURES / "zero3-bf16-w4"):
        store.files.clear()
        store.put_folder(source, URL)
        assert detect(URL).kind == detect(source).kind

        events.clear()
        with ckpt.open(URL) as remote:
            values = remote.get_tensors()
            metadata = remote.metadata()
        require_apart(events, source)
        with ckpt.open(source) as local:
            assert metadata == local.metadata()
            assert local.keys() == values.keys()
            assert all(same(values[name], local[name]) for name in local)

    capsys.readouterr()
    run("show", URL, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["path"].startswith(URL) and shown["kind"] == "deepspeed"


def test_optimizer_state_is_read(store: MemoryStore, events: list[str]) -> None:
    for name in ("zero2-bf16-w4", "zero3-bf16-w4"):
        store.files.clear()
        store.put_folder(FIXTURES / name, URL)
        events.clear()
        state = ckpt.open(URL).optimizer_state("norm.weight")
        require_apart(events, FIXTURES)
        expected = ckpt.open(FIXTURES / name).optimizer_state("norm.weight")
        assert same(state["exp_avg"], expected["exp_avg"])


def test_an_output_is_local_and_has_to_be_named(store: MemoryStore, tmp_path: Path) -> None:
    store.put_folder(FIXTURES / "zero2-bf16-w4", URL)
    with pytest.raises(CheckpointError, match=f"{URL} is a URL") as raised:
        ckpt.convert.plan(URL)
    assert raised.value.kind == "unsupported"
    for output in (None, f"{URL}-out"):
        with pytest.raises(CheckpointError, match="is a URL"):
            ckpt.reshard.plan(URL, 2, output=output)
        with pytest.raises(CheckpointError, match="is a URL"):
            ckpt.universal.plan_to(URL, output=output)


def test_what_is_wrong_is_said_with_the_url(store: MemoryStore) -> None:
    with pytest.raises(CheckpointError, match=f"{URL} does not exist"):
        ckpt.convert.plan(URL, "out")
    store.put_folder(FIXTURES / "zero2-bf16-w4", URL)
    (rank_file,) = [
        name for name in store.files if name.endswith("rank_1_mp_rank_00_optim_states.pt")
    ]
    whole = store.files.pop(rank_file)
    with pytest.raises(CheckpointError, match=f"{URL}/global_step2 was saved by 4 ranks"):
        ckpt.convert.plan(URL, "out")
    store.put(rank_file, whole.data[:1000])
    with pytest.raises(CheckpointError, match=rank_file):
        ckpt.convert.plan(URL, "out")


def test_an_unknown_scheme_is_one_sentence(store: MemoryStore) -> None:
    with pytest.raises(CheckpointError) as raised:
        detect("s3://bucket/run")
    assert str(raised.value) == (
        "s3://bucket/run is a URL of a kind (s3://) that ckpt does not read: it reads local "
        "files and made-up://; download it first: aws s3 cp --recursive s3://bucket/run DIR"
    )
    assert raised.value.kind == "unsupported"


def test_a_path_that_is_a_url_stays_one() -> None:
    path = UrlPath(URL) / "global_step2"
    assert str(path) == f"{path}" == f"{URL}/global_step2"
    assert path.parent == UrlPath(URL) and hash(path.parent) == hash(UrlPath(URL))
    assert (path.name, str(path.parent.parent), path.suffix) == (
        "global_step2",
        f"{SCHEME}://bucket",
        "",
    )
    assert str(path.with_name("latest.pt")) == f"{URL}/latest.pt"
    assert path.relative_to(UrlPath(URL)).as_posix() == "global_step2"
    bucket = UrlPath(f"{SCHEME}://bucket")
    assert bucket.parent == bucket and list(path.parents) == [UrlPath(URL), bucket]
    assert sorted([path / "b", path / "a"]) == [path / "a", path / "b"]
    assert path.is_absolute() and absolute(path) is path.resolve() is path
    for ask in (path.exists, path.is_dir, path.iterdir, path.read_bytes, path.mkdir):
        with pytest.raises(CheckpointError, match=f"^{path} is a URL"):
            ask()


def test_the_scheme_may_be_in_capitals(store: MemoryStore, tmp_path: Path) -> None:
    store.put_folder(FIXTURES / "zero2-bf16-w2", URL)
    assert detect(URL.replace(SCHEME, SCHEME.upper())).path == UrlPath(URL)
    run("to-fp32", URL.replace(SCHEME, SCHEME.upper()), "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "command", [["to-fp32"], ["reshard", "--world-size", "3"], ["to-universal"]]
)
def test_a_url_without_an_output_is_told_to_name_one(
    command: list[str], store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put_folder(FIXTURES / "zero2-bf16-w2", URL)
    run(*command, URL, code=1)
    expected = f"{URL} is a URL, and the output has to be a local folder: name it with -o DIR"
    assert capsys.readouterr().err == f"ckpt: {expected}\n"


def test_the_numbers_of_a_checkpoint_are_read_from_its_url(
    store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / "zero2-bf16-w4"
    store.put_folder(source, URL)
    run("stats", URL)
    remote = capsys.readouterr().out
    run("stats", source)
    assert capsys.readouterr().out == remote

    run("diff", URL, source, "--exact", "--state", "exp_avg")
    assert capsys.readouterr().out == "15 tensors the same\n"
