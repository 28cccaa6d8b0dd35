"""ckpt.zero_to_fp32 beside deepspeed.utils.zero_to_fp32, and models made ordinary again."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import peft_models
import pytest
import torch
from made_checkpoints import make_checkpoint
from oracles import FIXTURES, ROOT, live, same, weights_in
from safetensors.torch import load_file

import ckpt
from ckpt import zero_to_fp32 as ours
from ckpt.folders import scratch
from converters.errors import CheckpointError
from converters.execute import workers

NAMES = ["zero2-bf16-w3", "zero3-bf16-w2", "zero3-fp16-w4", "trainer-zero3"]


def source(name: str) -> Path:
    folder = FIXTURES / name
    return folder / "checkpoint-2" if name.startswith("trainer") else folder


@pytest.mark.parametrize(
    "name",
    [
        "get_fp32_state_dict_from_zero_checkpoint",
        "convert_zero_checkpoint_to_state_dict",
        "convert_zero_checkpoint_to_fp32_state_dict",
        "load_state_dict_from_zero_checkpoint",
    ],
)
def test_names_and_arguments_are_deepspeeds(name: str) -> None:
    from deepspeed.utils import zero_to_fp32 as theirs

    wanted = list(inspect.signature(getattr(theirs, name)).parameters)
    found = inspect.signature(getattr(ours, name)).parameters
    assert list(found)[: len(wanted)] == wanted
    assert all(
        found[extra].kind is inspect.Parameter.KEYWORD_ONLY
        for extra in found
        if extra not in wanted
    )


def test_arguments_of_deepspeed_before_0_15_3_are_taken(tmp_path: Path) -> None:
    path, file = source("zero2-bf16-w3"), str(tmp_path / "pytorch_model.bin")
    convert = ours.convert_zero_checkpoint_to_fp32_state_dict
    whole = ours.get_fp32_state_dict_from_zero_checkpoint(path)
    for call in (
        lambda: convert(str(path), file, "global_step2", True),
        lambda: convert(str(path), output_file=file, exclude_frozen_parameters=True),
        lambda: convert(path, output_file=file, tag="global_step2", exclude_frozen_parameters=True),
    ):
        call()
        found = torch.load(file, weights_only=True)
        assert found.keys() == whole.keys() - {"frozen.weight", "frozen.bias"}
        Path(file).unlink()
    with pytest.raises(TypeError, match="output_dir is not given"):
        convert(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exclude", [False, True])
def test_the_state_dict_is_deepspeeds_with_frozen_weights_in_fp32(name: str, exclude: bool) -> None:
    from deepspeed.utils import zero_to_fp32 as theirs

    expected = theirs.get_fp32_state_dict_from_zero_checkpoint(
        str(source(name)), exclude_frozen_parameters=exclude
    )
    for lazy in (False, True):
        found = ours.get_fp32_state_dict_from_zero_checkpoint(
            str(source(name)), exclude_frozen_parameters=exclude, lazy_mode=lazy
        )
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            held = found[key].contiguous()
            assert held.shape == found[key].shape and held.dtype == found[key].dtype
            wide = value.float() if value.is_floating_point() else value
            assert same(held, wide), key
    if "head.weight" in found:
        eager = ours.get_fp32_state_dict_from_zero_checkpoint(source(name))
        assert eager["head.weight"] is eager["embed.weight"]


def test_buffers_of_types_that_only_torch_has_are_deepspeeds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from deepspeed.utils import zero_to_fp32 as theirs

    folder = shutil.copytree(source("zero2-bf16-w2"), tmp_path / "c")
    (path,) = folder.glob("*/mp_rank_00_model_states.pt")
    root = torch.load(path, weights_only=False)
    freqs = torch.arange(3.0).to(torch.complex128)
    root["module"]["freqs"] = freqs
    torch.save(root | {"buffer_names": [*root["buffer_names"], "freqs"]}, path)

    expected = theirs.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    for lazy in (False, True):
        found = ours.get_fp32_state_dict_from_zero_checkpoint(folder, lazy_mode=lazy)
        assert found.keys() == expected.keys()
        assert same(found["freqs"].contiguous(), freqs) and same(expected["freqs"], freqs)
    with ckpt.open(folder) as opened:
        assert same(opened["freqs"], freqs)

    target = torch.nn.Module()
    target.register_buffer("freqs", torch.zeros(3, dtype=torch.complex128))
    ours.load_state_dict_from_zero_checkpoint(target, folder)
    assert "not in the model" in caplog.text
    assert same(target.freqs, freqs)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("limit", ["10KB", None])
def test_files_are_written_as_deepspeed_writes_them(
    safe: bool, limit: str | None, tmp_path: Path
) -> None:
    from deepspeed.utils import zero_to_fp32 as theirs

    name = source("trainer-zero3")
    for module, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
        folder.mkdir()
        (folder / "mine.txt").touch()
        module.convert_zero_checkpoint_to_fp32_state_dict(
            str(name), str(folder), max_shard_size=limit, safe_serialization=safe
        )
    found, expected = weights_in(tmp_path / "ours"), weights_in(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    assert all(same(found[key], expected[key]) for key in expected)
    index = [path.name for path in (tmp_path / "theirs").glob("*.index.json")]
    assert [path.name for path in (tmp_path / "ours").glob("*.index.json")] == index
    assert (tmp_path / "ours/mine.txt").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "fp16"])
def test_the_type_may_be_chosen(dtype: object, tmp_path: Path) -> None:
    ours.convert_zero_checkpoint_to_state_dict(source("zero2-bf16-w3"), tmp_path, dtype)
    wanted = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
    assert weights_in(tmp_path)["norm.weight"].dtype is wanted
    with pytest.raises(ValueError, match="unsupported output dtype"):
        ours.convert_zero_checkpoint_to_state_dict(source("zero2-bf16-w3"), tmp_path, "int8")


def test_it_runs_as_the_script_in_a_checkpoint_does(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "ckpt/zero_to_fp32.py")]
    options = ["--max_shard_size", "1KB", "--safe_serialization", "--tag", "global_step2", "-d"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    args = [str(source("zero2-bf16-w3")), str(tmp_path / "m"), *options]
    subprocess.run([*script, *args], check=True, timeout=60, env=environment)
    assert (tmp_path / "m/model.safetensors.index.json").is_file()
    done = subprocess.run(
        [*script, "nowhere", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "path", ["pipelines-and-experts/pipeline-zero1", "corpus/moe_s2", "corpus/tp_z2_w4"]
)
def test_the_script_reads_what_the_functions_read(path: str, tmp_path: Path) -> None:
    script(FIXTURES / path, "m", cwd=tmp_path)
    ours.convert_zero_checkpoint_to_fp32_state_dict(FIXTURES / path, tmp_path / "expected")
    paths = [tmp_path / folder / "pytorch_model.bin" for folder in ("m", "expected")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "{m}.pt", "model.safetensors"])
def test_an_output_that_is_named_as_a_file_is_one_file(name: str, tmp_path: Path) -> None:
    path = source("zero2-bf16-w3")
    expected = ours.get_fp32_state_dict_from_zero_checkpoint(path)
    for _ in range(2):  # as before DeepSpeed 0.15.3, over the file of the last time too
        ours.convert_zero_checkpoint_to_fp32_state_dict(path, tmp_path / name, "1KB")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    if name.endswith(".safetensors"):
        found = load_file(tmp_path / name)
    else:
        found = torch.load(tmp_path / name, weights_only=True)
    assert found.keys() == expected.keys()
    assert all(same(found[key], expected[key]) for key in expected)


def script(*args: object, cwd: Path, code: int = 0) -> tuple[str, str]:
    """What the script's ``main`` prints, and says on stderr, in this process.

    As processes it runs in the test above and for several ranks below.
    """
    output, errors = StringIO(), StringIO()
    with chdir(cwd), redirect_stdout(output), redirect_stderr(errors):
        try:
            ours.main([str(arg) for arg in args])
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
    assert status == code, errors.getvalue()
    return output.getvalue(), errors.getvalue()


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ((".", "pytorch_model.bin"), ["pytorch_model.bin"]),
        ((".", "."), ["pytorch_model.bin"]),
        ((".", "out"), ["out/pytorch_model.bin"]),
        ((".", "out", "--safe_serialization"), ["out/model.safetensors"]),
        ((".", "m.safetensors", "--safe_serialization", "-d"), ["m.safetensors"]),
        ((".", "pytorch_model.bin", "-t", "global_step2", "-e"), ["pytorch_model.bin"]),
        (
            (".", "out", "--max_shard_size", "100KB"),
            ["out/pytorch_model.bin"],
        ),
    ],
)
def test_the_guides_commands_write_the_files_that_the_guide_names(
    args: tuple[str, ...], names: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(source("trainer-zero2"), tmp_path / "checkpoint-2")
    for name in names * 2:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"what was there before")
    for _ in range(2):
        assert script(*args, cwd=folder)[0].split() == names
    for name in names:
        read = load_file if name.endswith("safetensors") else torch.load
        found = read(folder / name)
        expected = live(FIXTURES / "trainer-zero2")["fp32"]
        assert all(same(value, expected[key]) for key, value in found.items() if key in expected)
        assert len(found) >= len(expected) - 1


def test_what_is_there_stays_until_the_new_file_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"before")

    def stop(*_: object, **__: object) -> None:
        assert file.read_bytes() == b"before"
        raise KeyboardInterrupt

    monkeypatch.setattr(workers.Mover, "move", stop)
    with pytest.raises(KeyboardInterrupt):
        ours.convert_zero_checkpoint_to_fp32_state_dict(source("zero2-bf16-w3"), file)
    assert file.read_bytes() == b"before"


def test_all_ranks_may_convert_into_one_folder_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ckpt.zero_to_fp32", str(source("zero2-bf16-w3"))]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    ranks = [
        subprocess.Popen(
            [*command, str(tmp_path / "m"), "--max_shard_size", "1KB"], env=environment
        )
        for _ in range(3)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    expected = ours.get_fp32_state_dict_from_zero_checkpoint(source("zero2-bf16-w3"))
    found = weights_in(tmp_path / "m")
    assert found.keys() == expected.keys() and not list(tmp_path.glob("m/.*"))


def test_what_a_killed_conversion_left_goes_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    code = (
        "import os, signal; from pathlib import Path; from ckpt.folders import scratch\n"
        f"with scratch.folder_for(Path({str(path)!r})) as folder:\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    (leftover,) = tmp_path.iterdir()
    with scratch.folder_for(path) as folder:
        assert [*tmp_path.iterdir()] == [folder] != [leftover]
        with scratch.folder_for(path) as other:
            assert {*tmp_path.iterdir()} == {folder, other}
    assert not list(tmp_path.iterdir())


def test_a_name_of_torch_is_not_a_safetensors_file(tmp_path: Path) -> None:
    args = (source("zero2-bf16-w3"), "pytorch_model.bin", "--safe_serialization")
    _, said = script(*args, cwd=tmp_path, code=1)
    assert said.count("\n") == 1 and "name a folder, or a file that ends in .safetensors" in said
    _, debugged = script(*args, "-d", cwd=tmp_path, code=1)
    assert "Traceback" in debugged


@pytest.mark.parametrize("name", ["zero3-bf16-w2", "zero3-fp16-w4"])
def test_the_model_file_of_rank_0_is_enough_where_nothing_is_frozen(
    name: str, tmp_path: Path
) -> None:
    from deepspeed.utils import zero_to_fp32 as theirs

    folder = shutil.copytree(source(name), tmp_path / "c")
    for path in folder.glob("*/zero_pp_rank_*_model_states.pt"):
        root = torch.load(path, weights_only=False)
        root |= {"frozen_param_shapes": None, "frozen_param_fragments": None}
        torch.save(root, path)
        if "rank_0" not in path.name:
            path.unlink()
    expected = theirs.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    found = ours.get_fp32_state_dict_from_zero_checkpoint(folder)
    assert found.keys() == expected.keys()
    assert all(same(found[key], expected[key]) for key in expected)


def test_an_adapters_checkpoint_goes_into_the_model_with_its_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from deepspeed.utils import zero_to_fp32 as theirs

    torch.manual_seed(1)
    trained = peft_models.model("lora")
    make_checkpoint(
        tmp_path / "c",
        {name: p + 1 for name, p in trained.named_parameters() if p.requires_grad},
    )
    targets = [peft_models.model("lora") for _ in range(2)]
    targets[1].load_state_dict(targets[0].state_dict())
    theirs.load_state_dict_from_zero_checkpoint(targets[0], str(tmp_path / "c"))
    ours.load_state_dict_from_zero_checkpoint(targets[1], str(tmp_path / "c"))
    assert "not in the checkpoint, so left as they are" in caplog.text
    expected, found = (target.state_dict() for target in targets)
    assert all(same(found[key], expected[key]) for key in expected)
    with pytest.raises(CheckpointError, match="have no value"):  # and no adapter to take it
        ours.load_state_dict_from_zero_checkpoint(peft_models.llama(), tmp_path / "c")


def test_a_file_in_the_place_of_the_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(SystemExit):
        ours.main([str(source("zero2-bf16-w3")), str(tmp_path / "m")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is a file; name a folder, or a file that ends in" in said


def model(name: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source(name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["trainer-zero2", "trainer-zero3"])
def test_weights_are_loaded_into_the_models_own_storage(name: str, dtype: torch.dtype) -> None:
    target = model(name).to(dtype)
    places = {key: value.data_ptr() for key, value in target.named_parameters()}
    loaded = ours.load_state_dict_from_zero_checkpoint(target, source(name))
    assert loaded is target
    state = loaded.state_dict()
    for key, value in live(FIXTURES / name)["fp32"].items():
        assert same(state[key], value.to(dtype)), key
    assert {key: value.data_ptr() for key, value in loaded.named_parameters()} == places


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "module._orig_mod"])
@pytest.mark.parametrize("of_model", [True, False])
def test_wrappers_of_the_checkpoint_or_of_the_model_do_not_matter(
    wrapper: str, of_model: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made(wrapped: bool) -> torch.nn.Module:
        inner: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        for name in reversed(wrapper.split(".")) if wrapped else ():
            inner = torch.nn.ModuleDict({name: inner})
        return inner

    trained, target = made(not of_model), made(of_model)
    make_checkpoint(tmp_path, dict(trained.named_parameters()))

    ours.load_state_dict_from_zero_checkpoint(target, tmp_path)
    assert caplog.text == ""

    pairs = zip(trained.parameters(), target.parameters(), strict=True)
    assert all(torch.equal(value, loaded) for value, loaded in pairs)


def test_a_parameter_without_a_value_is_an_error_and_nothing_is_changed() -> None:
    target = model("trainer-zero3")
    target.extra = torch.nn.Linear(2, 2)
    target.lm_head = torch.nn.Linear(3, 4)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        ours.load_state_dict_from_zero_checkpoint(target, source("trainer-zero3"))
    said = str(raised.value)
    assert "3 tensors of the model have no value: lm_head.bias, extra.weight, extra.bias" in said
    assert "1 has another shape: lm_head.weight is 4 x 3, stored as 64 x 16" in said
    assert all(same(before[key], value) for key, value in target.state_dict().items())


def test_names_the_model_does_not_have_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    target = model("trainer-zero3")
    del target.lm_head
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the logger says it, once
        ours.load_state_dict_from_zero_checkpoint(target, source("trainer-zero3"))
    assert [record.name for record in caplog.records] == ["ckpt"]
    assert "not in the model: lm_head.weight" in caplog.text
