"""Bombs and lies without code: pickles that grow, tensors that reach out, headers that overlap."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from functools import cache, partial

from hardening.hostile.opcodes import encoded, head

# Views that torch makes, too (``expand``), and that only ckpt.open computes: right weights beside
# them are a good answer.
VIEWS = (
    "one element 2**40 times",
    "one element 2**40 times, twice",
    "overlapping rows",
)
_STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"


def _tensor(
    key: str, numel: int, at: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """The opcodes of a fp32 tensor in a storage, whatever the numbers say."""
    pid = _STORAGE + encoded(key, 2) + encoded("cpu", 2) + _number(numel) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(_number, n)) + b"t" for n in (shape, stride))
    order = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + _number(at) + sizes + order + b"tR"


def _number(n: int) -> bytes:
    data = n.to_bytes(17, "little", signed=True)
    return b"\x8a\x11" + data


def tensors(key: str, numel: int) -> dict[str, bytes]:
    """Tensor lies about a storage that has ``numel`` elements."""
    half = numel // 2
    tensor = partial(_tensor, key)
    return {
        "numel larger than its record": tensor(numel + 1, 0, (numel + 1,), (1,)),
        "numel smaller than its record": tensor(half, 0, (half,), (1,)),
        "numel of 2**62": tensor(1 << 62, 0, (1 << 62,), (1,)),
        "numel negative": tensor(-numel, 0, (numel,), (1,)),
        "view past its storage": tensor(numel, half, (numel,), (1,)),
        "view by one element": tensor(numel, 1, (numel,), (1,)),
        "offset of 2**62": tensor(numel, 1 << 62, (1,), (1,)),
        "offset negative": tensor(numel, -1, (1,), (1,)),
        "shape negative": tensor(numel, 0, (-numel,), (1,)),
        "two negative sizes": tensor(numel, 0, (-2, -half), (half, 1)),
        "stride negative": tensor(numel, numel - 1, (numel,), (-1,)),
        "stride past the end": tensor(numel, 0, (2, half), (numel, 1)),
        "stride of 2**62": tensor(numel, 0, (2,), (1 << 62,)),
        "one element 2**40 times": tensor(numel, 0, (1 << 40,), (0,)),
        "one element 2**40 times, twice": tensor(numel, 0, (1 << 20, 1 << 20), (0, 0)),
        "overlapping rows": tensor(numel, 0, (1 << 20, half), (0, 1)),
        "shape without stride": tensor(numel, 0, (numel,), ()),
        "100,000 axes": tensor(numel, 0, (1,) * 100_000, (1,) * 100_000),
        "shape of text": tensor(numel, 0, (2,), (1,)).replace(_number(2), b"X\1\0\0\0a"),
        "shape of floats": tensor(numel, 0, (2,), (1,)).replace(_number(2), b"G@\0\0\0\0\0\0\0"),
        "unknown element type": tensor(numel, 0, (2,), (1,)).replace(b"FloatSt", b"ThingSt"),
        "quantized element type": tensor(numel, 0, (2,), (1,)).replace(b"FloatSt", b"QInt8St"),
        "storage that is no storage": tensor(numel, 0, (2,), (1,)).replace(
            b"storagec", b"sturagec"
        ),
        "storage by a path": tensor(numel, 0, (2,), (1,)).replace(
            encoded(key, 2), encoded("../data/0", 2)
        ),
        "dtype that is none": b"ctorch._utils\n_rebuild_tensor_v3\n("
        + _STORAGE
        + encoded(key, 2)
        + encoded("cpu", 2)
        + _number(numel)
        + b"tQ"
        + _number(0)
        + b"(K\x02t(K\x01t\x89}ctorch\nfloat3\ntR",
    }


@cache
def bombs() -> Mapping[str, bytes]:
    """Values that are small on disk, as opcodes that leave one object on the stack."""
    doubled = b"]" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(200))
    tuples = b")" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(200))
    wide = b"(" + b"K\x01" * 100_000 + b"tq\x00"
    text = b"X" + struct.pack("<I", 1 << 16) + b"a" * (1 << 16) + b"q\x00"
    name = b"X\x01\x00\x00\x00a"
    ints = ((i * ((1 << 61) - 1)).to_bytes(11, "little") for i in range(1, 30_000))
    collide = b"".join(b"\x8a\x0b" + number for number in ints)
    pairs = b"".join(
        b"J%b\x8a\x09%b\x86" % (x.to_bytes(4, "little"), y.to_bytes(9, "little"))
        for x, y in alike(20_000)
    )
    copies = b"h\x01h\x00\x85R"  # the call of memo 1 with memo 0
    return {
        "lists doubled by the memo": doubled,
        "tuples doubled by the memo": tuples,
        "dicts doubled by the memo": b"}"
        + b"".join(b"q%c0}(K\x00h%cK\x01h%cu" % (i, i, i) for i in range(200)),
        "calls doubled by the memo": b"cx\ny\n"
        + b"".join(b"q%c0cx\ny\n(h%ch%ctR" % (i, i, i) for i in range(200)),
        "a tuple copied 10,000 times": b"("
        + wide
        + b"ctorch\nSize\nq\x010"
        + copies * 10_000
        + b"t",
        "a dict copied 3,000 times": b"(}("
        + b"".join(b"M%cxN" % i for i in range(256))
        + b"uq\x00"
        + b"ccollections\nOrderedDict\nq\x010"
        + copies * 3_000
        + b"t",
        "bytes to sizes, 10,000 times": b"(B"
        + struct.pack("<I", 1 << 16)
        + bytes(1 << 16)
        + b"q\x00ctorch\nSize\nq\x010"
        + copies * 10_000
        + b"t",
        "text encoded 10,000 times": b"("
        + text
        + b"c_codecs\nencode\nq\x010"
        + copies * 10_000
        + b"t",
        "lists in lists, a million": b"]" * 1_000_000 + b"a" * 999_999,
        "tuples in tuples, a million": b")" + b"\x85" * 1_000_000,
        "calls of calls, a million": b"cx\ny\n" + b")R" * 1_000_000,
        "states of states": b"cx\ny\n)R" * 200_000 + b"b" * 199_999,
        "a list in itself": b"]q\x00h\x00a",
        "a dict in itself": b"}q\x00K\x01h\x00s",
        "a million sets": b"(" + b"\x8f" * 1_000_000 + b"t",
        "a million dicts": b"(" + b"}" * 1_000_000 + b"t",
        "a million lists": b"(" + b"]" * 1_000_000 + b"l",
        "marks, a million": b"(" * 1_000_000 + b"t" * 1_000_000,
        "keys that cannot be keys": b"}(" + b"]N" * 300_000 + b"u",
        "memo entries, a million": b"N" + b"\x94" * 1_000_000,
        "keys of one hash": b"}(" + collide.replace(b"\x8a\x0b", b"N\x8a\x0b")[1:] + b"Nu",
        "members of one hash": b"\x8f(" + collide + b"\x90",
        "pairs of one hash": b"\x8f(" + pairs + b"\x90",
        "an int of 1 MB": b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20),
        "an int of 2 GB, announced": b"\x8b\xff\xff\xff\x7f\x01",
        "an int of negative length": b"\x8b\xff\xff\xff\xff\x01",
        "text of 4 GB, announced": b"X\xff\xff\xff\xffabc",
        "text of 2**63 bytes, announced": b"\x8d" + struct.pack("<Q", 1 << 63) + b"abc",
        "bytes of 2**62, announced": b"\x8e" + struct.pack("<Q", 1 << 62) + b"abc",
        "bytearray of 2**40, announced": b"\x96" + struct.pack("<Q", 1 << 40) + b"abc",
        "a frame of 2**60": b"\x95" + struct.pack("<Q", 1 << 60) + b"N",
        "memo index of 2**32": b"Nr\xff\xff\xff\xff",
        "memo index as text": b"Np99999999999999\n",
        "an int of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
        "global of a list": doubled + b"q\xff0h\xffh\xff\x93",
        "bytearray of a number": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
        "range of a number": b"cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R",
        "a line without end": b"c" + b"a" * 1_000_000,
        "a global of 1 MB": b"c" + b"a" * 1_000_000 + b"\nb\n",
        "escape codes in a name": b"c\x1b[2J\x1b]0;owned\x07\nb\n)R",
        "surrogates": b"X\x03\x00\x00\x00\xed\xa0\x80",
        "next buffer": b"\x97",
        "nothing on the stack": b"",
        "two objects": name + name,
        "an unfinished mark": b"(" + name,
    }


def alike(count: int) -> Iterator[tuple[int, int]]:
    """Pairs of ints that all have one hash: CPython's of tuples is xxHash, which can be undone."""
    p1, p2, p5, most = (
        *(11400714785074694791, 14029467366897019727, 2870177450012600261),
        (1 << 64) - 1,
    )
    inverse1, inverse2 = pow(p1, -1, 1 << 64), pow(p2, -1, 1 << 64)
    wanted = 12345 * inverse1 & most
    wanted = (wanted >> 31 | wanted << 33) & most
    for first in range(1 << 31):
        acc = (p5 + first * p2) & most
        acc = (acc << 31 | acc >> 33) & most
        second = (wanted - acc * p1) * inverse2 & most
        if second < (1 << 61) - 1:
            yield first, second
            count -= 1
        if not count:
            return


def pickles() -> Iterator[tuple[str, bytes]]:
    """The bombs as whole pickles of protocol 4."""
    for what, opcodes in bombs().items():
        yield what, head(4) + opcodes + b"."


def safetensors() -> dict[str, bytes]:
    """Files of safetensors that lie, holding ``a`` and ``b`` of 4 fp32 each where they can."""
    a, b = _entry(0, 16), _entry(16, 32)
    data = bytes(32)
    return {
        "a hole": _file({"a": a, "b": _entry(20, 36)}, bytes(36)),
        "a hole in front": _file({"a": _entry(4, 20)}, bytes(20)),
        "overlap": _file({"a": a, "b": _entry(8, 24)}, bytes(24)),
        "the same bytes twice": _file({"a": a, "b": a}, bytes(16)),
        "bytes left over": _file({"a": a, "b": b}, bytes(40)),
        "past the end": _file({"a": a, "b": _entry(16, 48, [8])}, data),
        "end before begin": _file({"a": _entry(16, 0)}, data),
        "negative offset": _file({"a": _entry(-16, 0)}, data),
        "offset of 2**63": _file({"a": _entry(1 << 63, (1 << 63) + 16)}, data),
        "shape too large": _file({"a": _entry(0, 16, [5])}, bytes(16)),
        "shape overflows": _file({"a": _entry(0, 16, [1 << 62, 1 << 62])}, bytes(16)),
        "shape negative": _file({"a": _entry(0, 16, [-2, -2])}, bytes(16)),
        "shape of floats": _file({"a": _entry(0, 16, [4.5])}, bytes(16)),  # type: ignore[list-item]
        "shape of bools": _file({"a": _entry(0, 4, [True])}, bytes(4)),
        "100,000 axes": _file({"a": _entry(0, 4, [1] * 100_000)}, bytes(4)),
        "unknown type": _file({"a": a | {"dtype": "F31"}}, bytes(16)),
        "type of another": _file({"a": a | {"dtype": ["F32"]}}, bytes(16)),
        "duplicate key": _raw(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
            data,
        ),
        "duplicate field": _raw(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"data_offsets":[16,32]}}', data
        ),
        "header of 2**60": struct.pack("<Q", 1 << 60) + b"{}",
        "header past the end": struct.pack("<Q", 100) + b"{}",
        "header of 0": struct.pack("<Q", 0) + b"{}",
        "lists nested": _raw(b"[" * 100_000 + b"]" * 100_000, b""),
        "objects nested": _raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
        "a number of a million digits": _raw(
            b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,16]}}', data
        ),
        "NaN": _raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', data),
        "no JSON": _raw(b"\xff\xfe{}", b""),
        "a list": _raw(b"[1,2]", b""),
        "a number": _raw(b"12", b""),
        "null entry": _raw(b'{"a":null}', b""),
        "too short": b"\x01\x02",
    }


def large() -> Iterator[tuple[str, bytes]]:
    """The same with headers of many MB, one at a time."""
    yield "header of 100 MB", _raw(b'{"a":' + b" " * 100_000_000 + b"}", b"")
    yield "header of 100 MB of lists", _raw(b'{"a":[' + b"[]," * 33_000_000 + b"[]]}", b"")
    yield "header of 20 MB of lists", _raw(b'{"a":[' + b"[]," * 7_000_000 + b"[]]}", b"")
    yield "header of 20 MB of numbers", _raw(b'{"a":[' + b"1," * 10_000_000 + b"1]}", b"")
    entry = b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield (
        "600,000 empty tensors",
        _raw(b"{" + b",".join(entry % i for i in range(600_000)) + b"}", b""),
    )


def _entry(first: int, last: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "F32", "shape": [4] if shape is None else shape, "data_offsets": [first, last]}


def _file(header: dict[str, dict[str, object]], data: bytes) -> bytes:
    return _raw(json.dumps(header, separators=(",", ":")).encode(), data)


def _raw(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data
