"""Bytes and values that are almost right: real ones, changed a little."""

from __future__ import annotations

import random
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hardening.fuzz.targets import FIXTURES, TAG

_ODD = (0, 1, 0x7F, 0x80, 0xFF)
_NUMBERS = (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 7 + b"\x80")
_WORDS = (b"(", b".", b"]", b"}", b"h\0", b"q\0", b"R", b"Q", b"\x93", b"t", b"u", b"s", b"b", b"o")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data after a few random edits."""
    held = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8, 30))):
        at = rng.randrange(len(held) + 1)
        match rng.randrange(8):
            case 0 if held:
                held[at % len(held)] ^= 1 << rng.randrange(8)
            case 1 if held:
                held[at % len(held)] = rng.choice(_ODD)
            case 2:
                held[at : at + rng.randrange(9)] = b""
            case 3:
                held[at:at] = rng.choice(_WORDS + _NUMBERS)
            case 4:
                word = rng.choice(_NUMBERS)
                held[at : at + len(word)] = word
            case 5:
                first = rng.randrange(len(held) + 1)
                held[at:at] = held[first : first + rng.randrange(64)]
            case 6 if rng.random() < 0.2:
                held = held[:at]
            case 7:
                held[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(5)))
    return bytes(held)


def seeds() -> dict[str, list[bytes]]:
    """Real files for each target."""
    paths = sorted((FIXTURES / "zero2-bf16-w2" / TAG).glob("*.pt"))
    paths += sorted((FIXTURES / "zero3-bf16-w2" / TAG).glob("*model_states.pt"))[:1]
    legacy = sorted((FIXTURES / "zero2-legacy" / TAG).glob("*.pt"))[:1]
    found = [path.read_bytes() for path in paths]
    stems = []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            stems.append(archive.read(name))
    tensors = (FIXTURES / "trainer-zero3/checkpoint-2/model.safetensors").read_bytes()
    record = (
        b'{"format":1,"step":5,"tag":"t","tier":"full","save":"0123456789abcdef","created":1.5,'
        b'"stage":2,"world_size":2,"node":0,"nodes":1,"versions":{"ckpt":"1"},"metrics":{"l":"nan",'
        b'"m":1.5},"progress":{"lr":[0.1]},"files":{"t/a.pt":{"size":3,"digest":"crc32:00000000"}}}'
    )
    index = b'{"metadata":{"total_size":8},"weight_map":{"a":"b.safetensors","c":"d.safetensors"}}'
    return {
        "pickle": stems,
        "zip": found,
        "torch file": [*found, *(path.read_bytes() for path in legacy)],
        "safetensors": [tensors],
        "index": [index],
        "manifest": [record],
        "dcp metadata": [dcp_metadata()],
    }


def dcp_metadata() -> bytes:
    """What torch writes of a distributed checkpoint of a model and an optimizer."""
    import torch
    import torch.distributed.checkpoint as dcp

    state = {"model": {"w": torch.ones(3)}, "optimizer": {"state": {"w": {"m": torch.ones(3)}}}}
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({**state, "step": 5}, checkpoint_id=folder, no_dist=True)
        return (Path(folder) / ".metadata").read_bytes()


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """A value that no state file should have where it stands."""
    import torch

    simple: list[Any] = [
        *(None, True, False, -1, 0, 1, 2, 7, 1 << 31, 1 << 62, 1 << 70, -(1 << 40)),
        *(0.5, float("nan"), float("inf"), "", "x", "\x1b[2J", "\ud800", b"", b"\xff"),
        *((), [], {}, set(), torch.Size([2, 3]), torch.Size([]), torch.bfloat16),
        *(torch.zeros(0), torch.zeros(()), torch.ones(3), torch.ones(2, 2, dtype=torch.int64)),
        *(torch.ones(4).expand(3, 4), torch.ones(2, 3).t(), torch.ones(5).bfloat16()),
        *(torch.ones(1, dtype=torch.complex128), torch.empty(2, device="meta"), object),
    ]
    value = rng.choice(simple)
    if depth < 2 and rng.random() < 0.3:
        inner = [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        names = dict(zip("abcd", inner, strict=False))
        value = rng.choice([inner, tuple(inner), names])
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of keys to all values of a state file, but single tensors' insides."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for at in range(min(len(value), 4)):
            yield from places(value[at], (*path, at))


def edited(state: Any, rng: random.Random) -> Any:
    """The state with a few of its values replaced, removed, swapped or doubled."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = list(places(state))
        if not found:
            return state
        path = rng.choice(found)
        holder = state
        for key in path[:-1]:
            holder = holder[key]
        match rng.randrange(6):
            case 0:
                del holder[path[-1]]
            case 1:
                other: Any = state
                for key in rng.choice(found):
                    other = other[key]
                holder[path[-1]] = other
            case 2 if isinstance(holder[path[-1]], int):
                holder[path[-1]] += rng.choice((-1, 1, 1 << 32))
            case 3 if isinstance(holder, dict):
                odd = rng.choice([0, 1, None, "x", "\x1b", (1, 2), -1.5, b"k", "\ud800", "a.b"])
                holder[odd] = holder[path[-1]]
            case _:
                holder[path[-1]] = odd_value(rng)
    return state
