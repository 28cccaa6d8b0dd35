"""State files in which one value is another: every place by turns, without torch.

What a pickle holds is read as a graph of objects, one node of it is replaced, taken out, cut
short or said twice, and the file is written again. So the places that a reader looks at are all
tried, and with values of every kind.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

from converters import detect
from converters.errors import CheckpointError, MalformedError
from converters.execute import shards
from converters.formats import safetensors
from converters.pickles.values import Call, Global
from converters.storage import open_files
from converters.tensors import DType, zeros
from converters.torch_files import file_plan, object_graph
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state, weights_16bit
from converters.zero.native import reshard
from converters.zero.native.optimizer_files import TargetTopology
from converters.zero.universal import native_source
from converters.zero.universal import plan as universal
from converters.zero.universal import reader as universal_reader
from hardening.fuzz.targets import FIXTURES

NAMES = (
    *("zero0-bf16", "zero0-bf16-fused", "zero0-fp32", "zero1-elastic", "zero1-bf16-w2"),
    *("zero2-aligned-round-robin", "zero2-fp16-w2", "zero3-bf16-w2", "zero3-exclude-frozen"),
    *("corpus/o0_3_16_s2", "corpus/s2muon", "corpus/b16opt", "corpus/s3sub"),
    *("universal/zero2-bf16-w2", "universal/zero3-bf16-w2"),  # made of these
    *("parallel/tp_fusedb_z3_w4", "parallel/tp_qwen3_frozen_z2_w4"),
    *("pipelines-and-experts/moe-zero1-frozen", "pipelines-and-experts/pipeline-zero1"),
    *("pipelines-and-experts/autoep-zero2", "pipelines-and-experts/autoep-zero3"),
    *("parallel/p3dm_z1_w4", "parallel/aeptp_mixtral_z2_w4", "parallel/tp_z0fp32_w4"),
    "pipelines-and-experts/autoep-zero3-tensor",
)
MAX_PLACES = 4  # of a list or dict: those after are like them
READ_SETTINGS = ("zero_optimization", "bf16", "fp16", "optimizer", "data_types", "checkpoint")


class Edit(Enum):
    """What is done to a place instead of putting a value there."""

    DROP = "taken out"
    HALVE = "cut short"
    DOUBLE = "said twice"
    RETYPE = "a tensor of another type"
    RESIZE = "a tensor of one element more"


def odd_values() -> list[Any]:
    """A value of each kind that may stand anywhere."""
    tensor = object_graph.tensor(object_graph.storage(zeros(DType.F32, 3)), (3,))
    number = object_graph.tensor(object_graph.storage(zeros(DType.I64, 1)), ())
    return [
        *(None, True, -1, 0, 3, 1 << 62, 0.5, float("nan"), float("inf"), "", "x", b"k"),
        *((), [], {}, [[]], [{}], [None], {"x": None}, {0: [1]}, [-1, 3], (1, 2)),
        *(Call(Global("collections", "OrderedDict"), (3,)), Call(Global("some", "Class"))),
        *(tensor, number, [tensor], {0: tensor}),
        *(-(1 << 40), 10**30, "a\0b", "\ud800", "..", set(), [0], {"params": [0]}, *Edit),
        *(_tensor(DType.F32, (0,)), _tensor(DType.BF16, (3,)), _tensor(DType.F64, (2, 3))),
        *(_nested(list), _nested(dict), Call(Global("torch", "Size"), ((1 << 50, 1 << 50),))),
    ]


def _tensor(dtype: DType, shape: tuple[int, ...]) -> Call:
    return object_graph.tensor(object_graph.storage(zeros(dtype, prod(shape))), shape)


def _nested(kind: type) -> Any:
    """Containers in each other, nearly as deep as a file is written."""
    value: Any = 0
    for _ in range(150):
        value = {"x": value} if kind is dict else [value]
    return value


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


def edited(node: Any, path: tuple[Any, ...], edit: Edit) -> Any:
    """The graph with a place taken out, cut short or said twice; as it is where that cannot be."""
    holder = node
    for key in path[:-1]:
        holder = getattr(holder, key) if isinstance(holder, Call) else holder[key]
    if not isinstance(holder, (dict, list, tuple)):
        return node

    key = path[-1]
    value = holder[key]
    if edit in (Edit.RETYPE, Edit.RESIZE):
        return _with_tensor(node, path, edit)
    if edit is Edit.HALVE:
        if isinstance(value, (list, tuple)):
            return replaced(node, path, value[: len(value) // 2])
        half = dict(list(value.items())[: len(value) // 2]) if isinstance(value, dict) else -1
        return replaced(node, path, half)

    new: Any = dict(holder) if isinstance(holder, dict) else list(holder)
    if edit is Edit.DROP:
        del new[key]
    elif isinstance(new, list):
        new.insert(key, value)
    else:
        new[0 if isinstance(key, str) else "x"] = value
    return replaced(node, path[:-1], tuple(new) if isinstance(holder, tuple) else new)


def _with_tensor(node: Any, path: tuple[Any, ...], edit: Edit) -> Any:
    """The graph with another tensor in the place of the one that the path leads to or into."""
    holder, tensors = node, []
    for length, key in enumerate(path, 1):
        holder = getattr(holder, key) if isinstance(holder, Call) else holder[key]
        is_tensor = isinstance(holder, Call) and len(holder.args) > 3
        if is_tensor and isinstance(holder.args[0], object_graph.Storage):
            tensors.append((path[:length], holder.args[0].dtype, holder.args[2]))
    if not tensors:
        return node

    place, dtype, shape = tensors[-1]
    if edit is Edit.RETYPE:
        return replaced(node, place, _tensor(DType.F64 if dtype is DType.F32 else DType.F32, shape))
    return replaced(node, place, _tensor(dtype, (*shape[:-1], shape[-1] + 1) if shape else (2,)))


def replaced(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The graph with another value at a place; what does not lead there stays the same."""
    if isinstance(value, Edit):
        return edited(node, path, value)
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
        self.readers = READERS
        if name.startswith("universal/"):
            source = zero.read(FIXTURES / name.removeprefix("universal/"))
            self.folder.mkdir(parents=True)
            shards.execute(universal.to_universal(source), self.folder)
            (self.folder / "latest_universal").write_text(universal.universal_tag(source))
            self.readers = (from_universal,)
        else:
            shutil.copytree(FIXTURES / name, self.folder)
            if name.startswith(("parallel/", "pipelines-and-experts/")):
                self.readers = (merged,)

        paths = sorted(self.folder.rglob("*_states.pt"))
        # a file of each kind, and a second rank's
        kinds = {path.name.partition("mp_rank")[2]: path for path in reversed(paths)}
        inner = sorted(self.folder.glob("*/zero/*.pt")) + sorted(self.folder.glob("*/zero/*/*.pt"))
        self.paths = sorted({*kinds.values(), *paths[:2], *inner[:5]})
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
        except (CheckpointError, MalformedError, ValueError, TypeError):  # no file can hold it
            shutil.rmtree(spare, ignore_errors=True)
            return None

        try:
            (spare / path.name).replace(path)
            with open_files.once():  # parsed once for all of them
                return next(filter(None, (fails(read, self.folder) for read in self.readers)), None)
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
        try:
            optimizer_state.read(checkpoint, name)
        except KeyError as error:
            if "is not trained" not in str(error):
                raise


def merged(folder: Path) -> None:
    """Weights and states of a parallel training, and the plan of a model."""
    source = detect.read(folder, complete=True)
    names = [*source.weights.trained]
    for name in {*names[:1], *names[-1:]} if source.optimizer else ():
        try:
            source.optimizer(name)
        except KeyError as error:
            if "is not trained" not in str(error):
                raise

    safetensors.plan(source.weights, DType.F32, 1 << 40, "keep")


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


def from_universal(folder: Path) -> None:
    """Plans of native files from a universal folder, of two stages."""
    source = native_source.checkpoint_of(universal_reader.read(folder, parallel=True))
    for stage in (1, 3):
        reshard.plan(source, TargetTopology(stage, 3))


READERS: tuple[Callable[[Path], None], ...] = (states, sixteen, resharded, to_universal)
