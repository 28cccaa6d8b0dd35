"""State files in which one value is another: every place by turns, without torch.

What a pickle holds is read as a graph of objects, one node of it is replaced, and the file is
written again. So the places that a reader looks at are all tried, and with values of every kind.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.execute import shards
from converters.pickles.values import Call, Global
from converters.storage import open_files
from converters.tensors import DType, zeros
from converters.torch_files import file_plan, object_graph
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state, weights_16bit
from converters.zero.native import reshard
from converters.zero.universal import plan as universal
from hardening.fuzz.targets import FIXTURES

NAMES = (
    *("zero0-bf16", "zero0-bf16-fused", "zero0-fp32", "zero1-elastic", "zero1-bf16-w2"),
    *("zero2-aligned-round-robin", "zero2-fp16-w2", "zero3-bf16-w2", "zero3-exclude-frozen"),
)
MAX_PLACES = 4  # of a list or dict: those after are like them
READ_SETTINGS = ("zero_optimization", "bf16", "fp16", "optimizer", "data_types", "checkpoint")


def odd_values() -> list[Any]:
    """A value of each kind that may stand anywhere."""
    tensor = object_graph.tensor(object_graph.storage(zeros(DType.F32, 3)), (3,))
    number = object_graph.tensor(object_graph.storage(zeros(DType.I64, 1)), ())
    return [
        *(None, True, -1, 0, 3, 1 << 62, 0.5, float("nan"), float("inf"), "", "x", b"k"),
        *((), [], {}, [[]], [{}], [None], {"x": None}, {0: [1]}, [-1, 3], (1, 2)),
        *(Call(Global("collections", "OrderedDict"), (3,)), Call(Global("some", "Class"))),
        *(tensor, number, [tensor], {0: tensor}),
    ]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a graph: keys of dicts, indices of lists, and fields of calls."""
    if path:
        yield path
    if path[:1] == ("ds_config",) and len(path) == 2 and path[1] not in READ_SETTINGS:
        return
    if isinstance(node, dict):
        for key in list(node)[:MAX_PLACES] if len(path) > 2 else node:
            yield from places(node[key], (*path, key))
    elif isinstance(node, (list, tuple)):
        for index in range(min(len(node), MAX_PLACES)):
            yield from places(node[index], (*path, index))
    elif isinstance(node, Call) and len(path) < 8:
        for field in ("args", "state", "pairs"):
            if getattr(node, field):
                yield from places(getattr(node, field), (*path, field))


def replaced(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The graph with another value at a place; what does not lead there stays the same."""
    if not path:
        return value
    key, *rest = path
    if isinstance(node, dict):
        return {**node, key: replaced(node[key], tuple(rest), value)}
    if isinstance(node, Call):
        fields = {"args": node.args, "state": node.state, "pairs": node.pairs}
        fields[key] = replaced(fields[key], tuple(rest), value)
        if not isinstance(fields["args"], tuple):
            fields["args"] = (fields["args"],)
        if not isinstance(fields["pairs"], (list, tuple)):
            fields["pairs"] = [("x", fields["pairs"])]
        pairs = [
            pair if isinstance(pair, tuple) and len(pair) == 2 else (0, pair)
            for pair in fields["pairs"]
        ]
        return Call(node.of, fields["args"], fields["state"], node.items, pairs, node.new)
    values = [*node[:key], replaced(node[key], tuple(rest), value), *node[key + 1 :]]
    return values if isinstance(node, list) else tuple(values)


class Trees:
    """A copy of a checkpoint, one of whose state files is edited."""

    def __init__(self, name: str, work: Path):
        self.folder = work / name
        shutil.copytree(FIXTURES / name, self.folder)
        paths = sorted(self.folder.rglob("*_states.pt"))
        # a file of each kind, and a second rank's
        kinds = {path.name.partition("mp_rank")[2]: path for path in reversed(paths)}
        self.paths = sorted({*kinds.values(), paths[0], paths[min(1, len(paths) - 1)]})
        self.roots = {path: object_graph.read(path).root for path in self.paths}
        self.cases = [(path, place) for path in self.paths for place in places(self.roots[path])]

    def tried(self, path: Path, place: tuple[Any, ...], value: Any) -> str | None:
        """What went wrong with a value at a place; ``None`` for weights or a proper error."""
        real = path.read_bytes()
        spare = self.folder / "spare"
        try:
            tree = replaced(self.roots[path], place, value)
            plan = file_plan.plan([file_plan.shard(path.name, tree)])
            spare.mkdir()
            shards.execute(plan, spare)
        except (CheckpointError, ValueError, TypeError):  # no file can hold it there
            shutil.rmtree(spare, ignore_errors=True)
            return None

        try:
            (spare / path.name).replace(path)
            with open_files.once():  # parsed once for all of them
                return next(filter(None, (fails(read, self.folder) for read in READERS)), None)
        finally:
            shutil.rmtree(spare)
            path.write_bytes(real)

    def every(self, rng: random.Random) -> Iterator[tuple[Path, tuple[Any, ...], Any]]:
        """All places with all values, in no order."""
        cases = [(path, place, value) for path, place in self.cases for value in odd_values()]
        rng.shuffle(cases)
        return iter(cases)


def fails(reader: Callable[[Path], Any], folder: Path) -> str | None:
    """What a reader raised that is not a proper error, as a line."""
    try:
        reader(folder)
    except CheckpointError as error:
        return None if str(error).isprintable() else "a message that is not printable"
    except Exception as error:
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"{reader.__name__}: {type(error).__name__} {str(error)[:80]} ({where})"
    return None


def states(folder: Path) -> None:
    """The optimizer's state of the first parameter and the last."""
    checkpoint = zero.read(folder)
    names = [*checkpoint.weights.trained]
    for name in {*names[:1], *names[-1:]}:
        with contextlib.suppress(KeyError):  # that the parameter is not trained
            optimizer_state.read(checkpoint, name)


def sixteen(folder: Path) -> None:
    """The 16-bit weights."""
    weights_16bit.read(folder)


def resharded(folder: Path) -> None:
    """Plans for other ranks, and for another stage."""
    checkpoint = zero.read(folder)
    for stage in (1, 3):
        reshard.plan(checkpoint, reshard.target(checkpoint, stage, 3))


def to_universal(folder: Path) -> None:
    """The plan of a universal folder."""
    universal.to_universal(zero.read(folder))


READERS: tuple[Callable[[Path], None], ...] = (states, sixteen, resharded, to_universal)
