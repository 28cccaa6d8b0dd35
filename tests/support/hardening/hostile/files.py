"""Hostile files: payloads, bombs and lies, in every container that they may come in."""

from __future__ import annotations

import io
import itertools
import random
import struct
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hardening.hostile import archives, lies
from hardening.hostile.archives import Entry
from hardening.hostile.opcodes import FORMS, asked, encoded, head, pickled
from hardening.hostile.payloads import PAYLOADS

CONTAINERS = (
    "stored",
    "deflated",
    "nested",
    "as module",
    "trailing pickle",
    "several pickles",
    "legacy stream",
    "legacy tar",
    "raw pickle",
)
BOMB_CONTAINERS = ("stored", "legacy stream", "raw pickle")
MAGIC = 0x1950A86A20F9469CFC6C
KEYS = (
    *("module", "param_shapes", "optimizer_state_dict", "shared_params"),
    *("ds_version", "global_steps", "buffer_names", "ds_config"),
)
# As good as what honest files hold: a text, a number of steps, of ranks.
HONEST = {
    "surrogates",
    *(f"global_steps {told}" for told in ("0", "2**20", "2**31", "2**40", "2**62")),
    "dp_world_size 2**20",
}


@dataclass(frozen=True, slots=True)
class Hostile:
    """A file by its class (code, bomb, tensor, zip, safetensors), a name, and its bytes.

    ``inert``: nothing tells it from an honest file, or no conversion reads that byte of it (each is
    named in docs/security.md); then the right weights are a good answer too.
    """

    kind: str
    name: str
    data: bytes = field(repr=False)
    inert: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """A real torch file to hide in: its records and, of these, the pickle."""

    entries: list[Entry]

    @property
    def pickle(self) -> bytes:
        return next(e.data for e in self.entries if e.name.endswith(b"/data.pkl"))

    @property
    def largest(self) -> tuple[str, int]:
        """The key of the largest storage, and its elements as fp32."""
        storages = (entry for entry in self.entries if b"/data/" in entry.name)
        found = max(storages, key=lambda entry: len(entry.data))
        return found.name.rpartition(b"/")[2].decode(), len(found.data) // 4

    def zipped(self, pickle: bytes, deflated: bool = False) -> bytes:
        """The file with another pickle."""
        return archives.written(
            [
                Entry(e.name, pickle if e.name.endswith(b"/data.pkl") else e.data)
                for e in self.entries
            ],
            deflated=deflated,
        )

    def holding(self, key: str, opcodes: bytes) -> bytes:
        """The file with one more value in its dict, or another one for a key it has."""
        return self.zipped(self.pickle[:-1] + encoded(key, 2) + opcodes + b"s.")


def template(path: Path) -> Template:
    """A real file as a template."""
    return Template(archives.entries_of(path))


def contained(real: Template, opcodes: bytes, protocol: int, container: str) -> bytes:
    """A value that is given as opcodes, in a file of the kind."""
    whole = head(protocol) + opcodes + b"."
    match container:
        case "stored" | "deflated":
            return real.zipped(whole, deflated=container == "deflated")
        case "nested":
            return real.holding("client", opcodes)
        case "as module":
            return real.holding("module", opcodes)
        case "trailing pickle":
            return real.zipped(real.pickle + whole)
        case "several pickles":
            return real.zipped(whole + real.pickle)
        case "legacy stream":
            start = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."
            return start + pickled(1001, 2) + pickled({}, 2) + whole + pickled([], 2)
        case "legacy tar":
            return _tar({"sys_info": pickled({}, 2), "pickle": whole, "storages": pickled(0, 2)})
        case "raw pickle":
            return whole
    raise ValueError(container)


def _tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def codes(real: Template, canary: Path, seed: int, count: int | None) -> Iterator[Hostile]:
    """Pickles that call: all combinations, or ``count`` of them chosen by the seed."""
    space = list(itertools.product(PAYLOADS, range(6), FORMS, CONTAINERS))
    random.Random(seed).shuffle(space)
    for payload, protocol, form, container in space[:count]:
        opcodes = asked(PAYLOADS[payload](canary), form, protocol)
        name = f"{payload}, protocol {protocol}, {form}, {container}"
        yield Hostile("code", name, contained(real, opcodes, protocol, container))


def every_code(real: Template, canary: Path) -> Iterator[Hostile]:
    """Each callable, form and container at least once."""
    for payload in PAYLOADS:
        opcodes = asked(PAYLOADS[payload](canary), "REDUCE", 2)
        yield Hostile("code", payload, contained(real, opcodes, 2, "nested"))
    for form, container in itertools.product(FORMS, CONTAINERS):
        opcodes = asked(PAYLOADS["os.system"](canary), form, 4)
        yield Hostile("code", f"{form}, {container}", contained(real, opcodes, 4, container))


def bombs(real: Template, names: Collection[str] = ()) -> Iterator[Hostile]:
    """Bombs as the whole file, beside what is needed, and in place of each of ``KEYS``.

    ``names``: only these bombs.
    """
    for what, opcodes in lies.bombs().items():
        if names and what not in names:
            continue
        for container in BOMB_CONTAINERS:
            yield _whole_bomb(real, what, opcodes, container)
        for key in ("client", *KEYS):
            yield _bomb_inside(real, what, opcodes, key)


def sampled_bombs(real: Template) -> Iterator[Hostile]:
    """Each bomb twice: as the whole of a file, and inside a real one.

    Containers and keys take turns, so that each holds several bombs.
    """
    keys = ("client", *KEYS)
    for number, (what, opcodes) in enumerate(lies.bombs().items()):
        container = BOMB_CONTAINERS[number % len(BOMB_CONTAINERS)]
        yield _whole_bomb(real, what, opcodes, container)
        yield _bomb_inside(real, what, opcodes, keys[number % len(keys)])


def _whole_bomb(real: Template, what: str, opcodes: bytes, container: str) -> Hostile:
    return Hostile("bomb", f"{what}, {container}", contained(real, opcodes, 4, container))


def _bomb_inside(real: Template, what: str, opcodes: bytes, key: str) -> Hostile:
    place = "nested" if key == "client" else f"as {key}"
    return Hostile("bomb", f"{what}, {place}", real.holding(key, opcodes), what in HONEST)


def tensors(real: Template) -> Iterator[Hostile]:
    """Tensor lies, as a tensor of the module and beside it."""
    for what, opcodes in lies.tensors(*real.largest).items():
        inert = what in lies.VIEWS
        module = real.holding("module", b"}" + encoded("w", 2) + opcodes + b"s")
        yield Hostile("tensor", f"{what}, in the module", module, inert)
        yield Hostile("tensor", f"{what}, nested", real.holding("client", opcodes), inert)
        flat = b"}" + encoded("single_partition_of_fp32_groups", 2) + b"]" + opcodes + b"as"
        weights = real.holding("optimizer_state_dict", flat)
        yield Hostile("tensor", f"{what}, as weights", weights)


def zips(real: Template) -> Iterator[Hostile]:
    """Zip tricks on the real file."""
    for what, data in archives.tricks(real.entries).items():
        yield Hostile("zip", what, data, inert=what == "central crc wrong")  # of Adam's


def damaged_numbers(real: Template) -> Iterator[Hostile]:
    """Numbers that something might allocate by, where a checkpoint has numbers."""
    for number in (-1, 0, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 4000):
        data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        opcodes = b"\x8b" + struct.pack("<I", len(data)) + data
        told = f"2**{number.bit_length() - 1}" if number > 0 else str(number)
        count = b"}" + encoded("partition_count", 2) + opcodes + b"s"
        ranks = real.holding("optimizer_state_dict", count)
        yield Hostile("bomb", f"partition_count {told}", ranks)
        shapes = b"]}" + encoded("w", 2) + b"(" + opcodes * 3 + b"tsa"
        yield Hostile("bomb", f"shape of {told}", real.holding("param_shapes", shapes))
        for key in ("mp_world_size", "dp_world_size", "global_steps"):
            what = f"{key} {told}"
            yield Hostile("bomb", what, real.holding(key, opcodes), inert=what in HONEST)
