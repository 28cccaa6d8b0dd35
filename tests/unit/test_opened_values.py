"""``ckpt.open`` reads what ``torch.load(weights_only=True)`` and ``safe_open`` read."""

from __future__ import annotations

import random
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, run
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import ckpt
from converters.formats import named_values

W = torch.arange(12.0).reshape(3, 4)
C = W.to(torch.complex64) + 1j


def quantized(dtype: torch.dtype = torch.qint8) -> torch.Tensor:
    return torch.quantize_per_tensor(W, 0.5, 1, dtype)


def by_channel(scales: torch.Tensor, dtype: torch.dtype = torch.qint8) -> torch.Tensor:
    zeros = torch.zeros(3, dtype=torch.float if scales.dtype is torch.float else torch.int64)
    return torch.quantize_per_channel(W, scales, zeros, 0, dtype)


def jagged(*parts: torch.Tensor) -> torch.Tensor:
    nested: torch.Tensor = torch.nested.nested_tensor(list(parts), layout=torch.jagged)
    return nested


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: W.clone(),
    "parameter": lambda: nn.Parameter(W.clone()),
    "buffer": lambda: nn.Buffer(W.clone()),
    "requires_grad": lambda: W.clone().requires_grad_(),
    "bool": lambda: W > 3,
    "complex64": lambda: C.clone(),
    "complex128": lambda: C.to(torch.complex128),
    "scalar": lambda: torch.tensor(3.5),
    "nothing": lambda: torch.zeros(0),
    "no_rows": lambda: torch.zeros(3, 0, 2),
    "view": lambda: torch.arange(20.0)[3:7],
    "transposed": lambda: W.t(),
    "step": lambda: torch.arange(20.0)[::3],
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "repeated": lambda: W[1, 1].expand(70_000),
    "repeated_rows": lambda: W[1:, 1:].t().expand(40_000, 3, 2),
    "repeated_complex": lambda: C.to(torch.complex128)[0, 0].expand(70_000),
    "conj": lambda: C.conj(),
    "conj128": lambda: C.to(torch.complex128).conj(),
    "neg": lambda: torch._neg_view(W),
    "imag_of_conj": lambda: C.clone().conj().imag,
    "neg_of_conj": lambda: torch._neg_view(C.conj()),
    "coo": lambda: W.to_sparse(),
    "csr": lambda: W.to_sparse_csr(),
    "no_values": lambda: torch.zeros(3, 4).to_sparse(),
    "sparse_parameter": lambda: nn.Parameter(W.to_sparse()),
    "qint8": quantized,
    "quint8": lambda: quantized(torch.quint8),
    "qint32": lambda: quantized(torch.qint32),
    "qzeros": lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
    "qview": lambda: quantized()[1:],
    "qtransposed": lambda: quantized().t(),
    "qnothing": lambda: torch.quantize_per_tensor(torch.zeros(0, 3), 1.0, 0, torch.qint8),
    "by_channel": lambda: by_channel(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)),
    "float_scales": lambda: by_channel(torch.tensor([0.5, 1.0, 2.0]), torch.quint8),
    "four_bits": lambda: by_channel(torch.tensor([0.5, 1.0, 2.0]), torch.quint4x2),
    "two_bits": lambda: by_channel(torch.tensor([4.0, 4.0, 4.0]), torch.quint2x4),
    "without_scale": lambda: torch.zeros(3, dtype=torch.int8).view(torch.qint8),
    "meta": lambda: torch.ones(3, 2, device="meta"),
}
# torch does not write or read these in the old form
NEW_ONLY: dict[str, Callable[[], torch.Tensor]] = {
    **{
        kind: lambda kind=kind: W.to(getattr(torch, kind))
        for kind in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex32")
    },
    **{
        kind: lambda kind=kind: torch.arange(8).to(getattr(torch, kind))
        for kind in ("uint16", "uint32", "uint64")
    },
    "float4": lambda: torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "conj32": lambda: C.to(torch.complex32).conj(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    "neg_of_bits": lambda: torch._neg_view(torch.arange(4, dtype=torch.uint8).view(torch.bits8)),
    "repeated_bits": lambda: torch.ones(1, dtype=torch.uint8).view(torch.bits8).expand(70_000),
    "jagged": lambda: jagged(W, W[:1]),
    "jagged_second_axis": lambda: jagged(torch.ones(2, 3), torch.ones(2, 1)),
    "jagged_with_holes": lambda: torch.nested.nested_tensor_from_jagged(
        W, offsets=torch.tensor([0, 2, 3]), lengths=torch.tensor([1, 1])
    ),
}
OTHERS: list[Any] = [
    *(None, True, 3, 1 << 90, 2.5, 1 + 2j, "text", b"bytes", torch.float16, torch.device("cpu")),
    *(torch.Size([2, 3]), {1, 2}, (), [], {}, [1, "a"], OrderedDict()),
]
KEYS: list[Any] = [*"abc", "a.b", "", "0", 0, 1, -3, 1.5, None, True, (1, "a"), b"k", torch.int8]


def made(random_source: random.Random, tensors: dict[str, Any], depth: int) -> Any:
    """Some object of dicts, lists, tuples, tensors and other values."""
    choice = random_source.random()
    if depth == 0 or choice < 0.35:
        return tensors[random_source.choice(sorted(tensors))]
    if choice < 0.5:
        return random_source.choice(OTHERS)

    members = [made(random_source, tensors, depth - 1) for _ in range(random_source.randrange(5))]
    if choice < 0.65:
        return members if choice < 0.6 else tuple(members)

    keys = random_source.sample(KEYS, len(members))
    kind = dict if choice < 0.85 else OrderedDict
    return kind(zip(keys, members, strict=True))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an object, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from tensors_in(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from tensors_in(member)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors have one type, layout and shape, and the same bits."""
    if (ours.dtype, ours.layout, ours.device) != (theirs.dtype, theirs.layout, theirs.device):
        return False
    if theirs.is_nested:
        pairs = zip(ours.unbind(), theirs.unbind(), strict=True)
        return all(same(*pair) for pair in pairs)
    if ours.shape != theirs.shape:
        return False
    if theirs.device.type == "meta":
        return True
    if theirs.layout is not torch.strided:
        return same(ours.to_dense(), theirs.to_dense())
    if theirs.is_quantized:
        return same_codes(ours, theirs)
    return bits(ours) == bits(theirs)


def same_codes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    try:
        scheme = theirs.qscheme()
    except RuntimeError:  # it has no scale, so nothing but its storage can be asked for
        return bytes(ours.untyped_storage()) == bytes(theirs.untyped_storage())
    if scheme is not ours.qscheme() or bits(ours.int_repr()) != bits(theirs.int_repr()):
        return False
    return bits(ours.dequantize()) == bits(theirs.dequantize())


def bits(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach()
    if dense.dtype is torch.bits8:  # nothing computes with these, so views of them stay views
        return bytes((dense.is_neg(), *dense.stride(), *dense.untyped_storage()))
    dense = dense.resolve_conj().resolve_neg().contiguous().clone()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def require_same(path: Path, value: Any, legacy: bool = False) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    expected = list(tensors_in(torch.load(path, weights_only=True)))
    with ckpt.open(path) as opened:
        assert len(list(opened)) == len(expected), (value, list(opened))
        for name, theirs in zip(opened, expected, strict=True):
            assert same(opened[name], theirs), (name, theirs)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_kind_of_tensor_is_read_as_torch_load_reads_it(tmp_path: Path, legacy: bool) -> None:
    for name, make in (TENSORS if legacy else TENSORS | NEW_ONLY).items():
        value = make()
        require_same(tmp_path / f"{name}.pt", {"w": value, "again": value}, legacy)
        require_same(tmp_path / f"{name}.pt", value, legacy)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("seed", range(60))
def test_any_object_of_tensors_is_read_as_torch_load_reads_it(
    tmp_path: Path, seed: int, legacy: bool
) -> None:
    makers = TENSORS if legacy else TENSORS | NEW_ONLY
    tensors = {name: make() for name, make in makers.items()}
    require_same(tmp_path / "x.bin", made(random.Random(seed), tensors, 4), legacy)


def test_values_of_one_dotted_name_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for value, names in {
        ((("a", (("b", 1.0),)), ("a.b", 2.0))): ["['a']['b']", "a.b"],
        ((("a.b", 1.0), ("a", (("b", 2.0),)))): ["a.b", "['a']['b']"],
        (((1, 1.0), ("1", 2.0))): ["[1]", "1"],
    }.items():
        state = {
            key: {inner: torch.tensor(number) for inner, number in member}
            if isinstance(member, tuple)
            else torch.tensor(member)
            for key, member in value
        }
        torch.save(state, path)
        with ckpt.open(path) as opened:
            assert list(opened) == names
            assert [float(opened[name]) for name in names] == [1.0, 2.0]


def test_a_name_that_looks_like_a_subscript_takes_none_away(tmp_path: Path) -> None:
    state = {"a": {"b": W}, "a.b": W + 1, "['a']['b']": W + 2}
    require_same(tmp_path / "x.pt", state)
    with ckpt.open(tmp_path / "x.pt") as opened:
        assert list(opened) == ["['a']['b'] (2)", "a.b", "['a']['b']"]


def test_a_single_tensor_and_nothing_at_all_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(W, path)
    with ckpt.open(path, "np") as opened:
        assert list(opened) == [named_values.ROOT]
        assert np.array_equal(np.asarray(opened["value"]), W.numpy())
    for nothing in ({}, [], (), set(), OrderedDict()):
        torch.save(nothing, path)
        with ckpt.open(path) as opened:
            assert list(opened) == [] and not opened.absent
    torch.save(7, path)
    with ckpt.open(path) as opened:
        assert list(opened) == [] and opened.metadata()["value"] == "7"


def test_a_set_of_tensors_is_read(tmp_path: Path) -> None:
    torch.save({"s": {W, W + 1}}, tmp_path / "x.pt")
    with ckpt.open(tmp_path / "x.pt") as opened:
        sums = sorted(float(torch.as_tensor(opened[name]).sum()) for name in ("s.0", "s.1"))
        assert sums == [66.0, 78.0]


def test_what_numpy_has_is_given_as_numpy_gives_it(tmp_path: Path) -> None:
    names = ("conj", "conj128", "neg", "imag_of_conj", "neg_of_conj", "complex128")
    state = {name: TENSORS[name]() for name in names}
    torch.save(state, tmp_path / "x.pt")
    with ckpt.open(tmp_path / "x.pt", "np") as opened:
        for name, tensor in state.items():
            expected = tensor.resolve_conj().resolve_neg().numpy()
            assert np.array_equal(np.asarray(opened[name]), expected), name
            assert np.array_equal(np.asarray(opened.get_slice(name)[1]), expected[1]), name


def test_the_files_that_a_trainer_keeps_are_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    with ckpt.open(tmp_path / "optimizer.pt") as opened:
        moment = optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(torch.as_tensor(opened["state.0.exp_avg"]), moment)
        assert opened.plain_values["param_groups.0.betas"] == (0.9, 0.999)
    with ckpt.open(tmp_path / "scheduler.pt") as opened:
        assert not list(opened)
        expected = {name: value for name, value in scheduler.state_dict().items() if name[0] != "_"}
        assert opened.plain_values.items() >= expected.items()
        assert opened.metadata()["step_size"] == "3"

    run("show", tmp_path / "scheduler.pt")
    shown = capsys.readouterr().out
    assert "\ntensors      none\n" in shown and "\nvalue        step_size = 3\n" in shown
    run("show", tmp_path / "optimizer.pt", "--tensors")
    shown = capsys.readouterr().out
    assert "\ntensors      6, 56 B in F32\n" in shown and "\nstate.0.exp_avg\tF32\t2 x 2\n" in shown


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "x_optim_states.pt"])
def test_a_state_file_of_deepspeed_is_opened_as_it_is(name: str, tmp_path: Path) -> None:
    """What is in it has the names of the file, so that nobody takes a part for the weights."""
    folder = FIXTURES / "zero2-bf16-w2/global_step2"
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt" if name.startswith("x") else name
    content = torch.load(folder / name, weights_only=False)
    with ckpt.open(folder / name) as opened:
        assert len(list(opened)) == len(list(tensors_in(content)))
        assert {each.partition(".")[0] for each in opened} <= content.keys()
        assert opened.plain_values["ds_version"] == content["ds_version"]


def test_plain_values_are_those_of_torch_load(tmp_path: Path) -> None:
    values = {"c": 1 + 2j, "b": b"x", "n": None, "t": (1, 2.5, "a"), "s": {1}, "i": 1 << 90}
    values |= {"array": bytearray(b"a\xff"), "count": Counter("aab")}
    types = {"dtype": torch.float16, "device": torch.device("cuda", 1), "layout": torch.sparse_coo}
    torch.save({"deep": [values, types, {"w": W}]}, tmp_path / "x.pt")
    with ckpt.open(tmp_path / "x.pt") as opened:
        by_name = {f"deep.0.{name}": value for name, value in values.items()}
        texts = {f"deep.1.{name}": str(value) for name, value in types.items()}
        assert opened.plain_values == by_name | texts and list(opened) == ["deep.2.w"]


def test_metadata_has_the_beginning_of_a_long_list(tmp_path: Path) -> None:
    path = tmp_path / "values.pt"
    torch.save({"state": tuple(range(600)), "text": "x" * 600, "weight": torch.ones(1)}, path)
    with ckpt.open(path) as opened:
        facts = opened.metadata()
    assert facts["state"].startswith("(0, 1, 2, ") and facts["state"].endswith("...")
    assert len(facts["state"]) < 120 and facts["text"] == "x" * 600


def test_a_file_of_objects_alone_is_refused_in_a_true_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "training_args.bin"
    torch.save(Namespace(lr=3), path)
    with pytest.raises(ckpt.CheckpointError, match=r"an object of argparse\.Namespace") as error:
        ckpt.open(path)
    assert "do not load" not in str(error.value)
    for command in ("show", "to-fp32"):
        run(command, path, code=1)
        assert "an object of argparse.Namespace" in capsys.readouterr().err
    torch.save({"args": Namespace(lr=3), "epoch": 2}, path)
    with ckpt.open(path) as opened:
        assert opened.plain_values == {"epoch": 2} and "argparse" in opened.absent["args"]


def test_show_counts_what_no_safetensors_file_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"coo": W.to_sparse(), "q": quantized()}, tmp_path / "x.pt")
    run("show", tmp_path / "x.pt", "--tensors")
    shown = capsys.readouterr().out
    assert "in 2 tensors" in shown and "in qint8, sparse\n" in shown
    assert "missing      nothing\n" in shown and "\ncoo\tsparse\t-\nq\tqint8\t3 x 4\n" in shown


def test_names_come_as_safe_open_and_the_file_have_them(tmp_path: Path) -> None:
    state = {"z": W, "b": torch.ones(2, dtype=torch.int8), "a": W.half(), "c": W + 1}
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.bin")
    with ckpt.open(tmp_path / "x.safetensors") as ours, safe_open(ours.path, "pt") as theirs:
        assert list(ours.keys()) == list(theirs.keys()) == sorted(state)
        assert ours.offset_keys() == theirs.offset_keys()
    with ckpt.open(tmp_path / "x.bin") as ours:
        assert list(ours) == list(state)


def test_scales_and_parts_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    """torch would be given memory that is not there, or fails with its own words."""

    class Forged:
        def __init__(self, function: Any, *arguments: Any):
            self.call = function, arguments

        def __reduce__(self) -> Any:
            return self.call

    def nested(offsets: list[int]) -> Forged:
        sizes, strides = torch.tensor([[2], [3]]), torch.tensor([[1], [1]])
        parts = (torch.ones(5), sizes, strides, torch.tensor(offsets))
        return Forged(torch._utils._rebuild_nested_tensor, *parts)

    def by_channels(count: int) -> Forged:
        storage = quantized()._typed_storage()
        scales = torch.ones(count, dtype=torch.float64)
        parameters = (torch.per_channel_affine, scales, scales.long(), 0)
        arguments = (storage, 0, (3, 4), (4, 1), parameters, False, OrderedDict())
        return Forged(torch._utils._rebuild_qtensor, *arguments)

    def rows(offsets: list[int], axis: int = 1) -> Forged:
        fields = {"values": torch.ones(5, 2), "offsets": torch.tensor(offsets), "lengths": None}
        arguments = ({**fields, "_ragged_idx": axis, "_metadata_cache": {}},)
        kind = type(jagged(torch.ones(2)))
        rebuild = torch.nested._internal.nested_tensor._rebuild_njt
        return Forged(torch._tensor._rebuild_from_type_v2, rebuild, kind, arguments, {})

    cut_wrong = (rows([0, 3, 6]), rows([0, 3, 2]), rows([-1, 2]), rows([0, 2], 3), rows([]))
    for forged in (nested([0, 3]), nested([0, 1 << 50]), by_channels(2), *cut_wrong):
        torch.save({"w": forged}, tmp_path / "x.pt")
        with (
            ckpt.open(tmp_path / "x.pt") as opened,
            pytest.raises(ckpt.CheckpointError, match=r"w: a (nested|quantized) tensor whose"),
        ):
            opened["w"]
