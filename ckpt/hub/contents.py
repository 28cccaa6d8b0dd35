"""What a push publishes of a checkpoint, by an allow-list, decided before the first byte is sent.

model            weights, converted while they are sent; index, config, tokenizer, code, card
adapter          the adapter's own files where PEFT is trained, not its tensors' training names
weights          of a checkpoint of tier "weights": its safetensors as they are
training state   everything that the manifest lists, and the manifest: to resume elsewhere
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt import convert
from ckpt.convert import Conversion
from ckpt.hub import card as cards
from ckpt.hub import facts as known
from ckpt.hub import secrets
from ckpt.hub.allowed import CARD, Allowed, allowed, refusal
from ckpt.hub.curve import curve
from ckpt.hub.items import Item, require_fitting
from ckpt.runs import engines, manifest
from ckpt.runs.run import Checkpoint
from converters import folder, safetensors
from converters.errors import CheckpointError
from converters.files import named
from converters.plan import Shard
from converters.tensors import DType, TensorRef

_BASES = {  # by file, where PEFT and transformers name the base model as it was given to them
    CARD: "base_model",
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
}
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Contents:
    """The files to send, and what to say of them.

    ``conversion`` is ``None`` where nothing is converted. ``left_out`` are files of the checkpoint
    that stay here, each with why. ``warnings`` are lines for whoever pushes. ``facts`` are JSON for
    ``--json`` and the card. ``made`` names the items (the model card and its picture) that were
    made for this push: leave them all out where the repository has a README.md.
    """

    items: tuple[Item, ...]
    conversion: Conversion | None
    left_out: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(item.nbytes for item in self.items)


def contents(
    checkpoint: Checkpoint,
    *,
    dtype: str = "fp32",
    max_shard_size: int,
    training_state: bool = False,
    tag: str | None = None,
    card: bool = True,
    repo: str | None = None,
    revision: str | None = None,
) -> Contents:
    """Decides what is sent of ``checkpoint``; reads no tensor.

    ``dtype`` is a key of ``convert.DTYPES``, ``max_shard_size`` in bytes. ``repo`` ("org/name") and
    ``revision`` are what the card's example loads. ``CheckpointError`` for what cannot be published
    whole, and for what is over the Hub's limits.
    """
    held = checkpoint.manifest
    if held is not None and held.nodes > 1:
        raise CheckpointError(
            f"{checkpoint.folder} holds the part of node {held.node} of {held.nodes}; bring the "
            "parts together with ckpt collect and push the result",
            "refused",
        )
    if training_state:
        found, root = _training_state(checkpoint), checkpoint.folder
    else:
        found, root = _model(checkpoint, dtype, max_shard_size, tag)
        if card and CARD not in {item.name for item in found.items}:
            found = _with_card(found, root, repo, revision)
    require_fitting(found.items)
    return replace(found, warnings=(*found.warnings, *_suspicions(root, found.items)))


def _training_state(checkpoint: Checkpoint) -> Contents:
    """Every file that the manifest lists, as it is, and the manifest."""
    root, held = checkpoint.folder, checkpoint.manifest
    if held is None or held.tier != "full":
        what = "is of weights alone" if held else "has no manifest.json to say what belongs to it"
        raise CheckpointError(
            f"{root} {what}; --include-training-state sends committed checkpoints that a training "
            f"can go on from, see ckpt ls {root.parent} and ckpt doctor {root.parent} --adopt",
            "refused",
        )
    items = [_listed(checkpoint, name) for name in (*held.files, manifest.NAME)]
    there = sorted(path.name for path in root.iterdir())
    listed = {item.name.partition("/")[0] for item in items}
    left_out = tuple((name, "not in the manifest") for name in there if name not in listed)
    facts = known.of_model(checkpoint, root) | {"kind": "training state", "dtype": None}
    return Contents(tuple(items), None, left_out, (), facts)


def _listed(checkpoint: Checkpoint, name: str, committed: bool = True) -> Item:
    """A file of the checkpoint that has to be sent; ``CheckpointError`` if it may not be.

    ``committed``: where there is a manifest, it has to list the file.
    """
    files = checkpoint.manifest.files if checkpoint.manifest else {}
    why = refusal(checkpoint.folder, name)
    if committed and files and name not in files and name != manifest.NAME:
        why = why or "the manifest does not list it, so it was not committed"
    if why is not None:
        raise CheckpointError(
            f"{checkpoint.folder / name} cannot be sent: {why}; nothing is sent without it",
            "refused",
        )
    return Item(name, checkpoint.folder / name, files.get(name))


def _model(
    checkpoint: Checkpoint, dtype: str, max_shard_size: int, tag: str | None
) -> tuple[Contents, Path]:
    """What ``from_pretrained`` wants, and the folder that its configuration is in."""
    if checkpoint.tier == "weights":
        return _stored(checkpoint, dtype), checkpoint.folder
    several = engines.names(checkpoint.manifest) if checkpoint.manifest else ()
    if several and tag is None:
        raise CheckpointError(
            f"{checkpoint.folder} has the engines {', '.join(several)}: push the folder of one, "
            f"ckpt push {checkpoint.folder / several[0]} --uncommitted",
            "unsupported",
        )
    saved = checkpoint.manifest.tag if checkpoint.manifest else None
    if tag is None and saved is not None and (checkpoint.folder / saved).is_dir():
        tag = saved
    root = folder.find(checkpoint.folder, tag).root
    if (root / ADAPTER[0]).is_file():
        return _stored(replace(checkpoint, folder=root), dtype), root
    if os.path.lexists(root / "config.json"):
        _listed(replace(checkpoint, folder=root), "config.json", committed=False).require_whole()
    conversion = convert.prepare(
        checkpoint.folder, tag=tag, dtype=dtype, max_shard_size=max_shard_size
    )
    items = [Item(shard.filename, shard) for shard in conversion.plan.shards]
    if conversion.plan.index is not None:
        items.append(Item(*conversion.plan.index))
    if conversion.config is not None:
        items.append(Item("config.json", conversion.config))
    rest = allowed(root, frozenset(item.name for item in items))
    items += _beside(checkpoint, rest)
    facts = {"kind": "model"} | known.of_model(checkpoint, root) | known.of_conversion(conversion)
    facts["code"] = any(name.endswith(".py") for name, _ in rest.files)
    absent = [
        f"absent: {name}: {why}" for name, why in conversion.checkpoint.weights.absent.items()
    ]
    warnings = (*rest.warnings, *absent, *(f"note: {note}" for note in conversion.notes))
    return Contents(tuple(items), conversion, rest.left_out, warnings, facts), root


def _stored(checkpoint: Checkpoint, dtype: str) -> Contents:
    """Weights that lie there as they are to be published: an adapter, or tier "weights"."""
    root, warnings = checkpoint.folder, []
    adapter = (root / ADAPTER[0]).is_file()
    names = list(ADAPTER) if adapter else _safetensors(root)
    items = [_listed(checkpoint, name) for name in names]
    paths = [root / name for name in names if name.endswith(".safetensors")]
    tensors = {n: ref for path in paths for n, ref in safetensors.read(path).tensors.items()}
    stored = _most(tensors.values())
    if dtype != "keep" and convert.DTYPES[dtype] is not stored:
        if not adapter:
            raise CheckpointError(
                f"{root} holds {stored.value} weights and no states to make {dtype} from; push "
                "them with --dtype keep",
                "refused",
            )
        warnings.append(f"{paths[0]} is sent as it is stored, in {stored.value}, not as {dtype}")
    if os.path.lexists(root / "config.json"):
        items.append(_listed(checkpoint, "config.json", committed=False))
    rest = allowed(root, frozenset(item.name for item in items))
    items += _beside(checkpoint, rest)
    facts = {"kind": "adapter" if adapter else "weights"} | known.of_model(checkpoint, root)
    facts |= {
        "dtype": next((n for n, d in convert.DTYPES.items() if d is stored), stored.value),
        "parameters": sum(ref.numel for ref in tensors.values()),
        "total_size": sum(ref.nbytes for ref in tensors.values()),
        "code": any(name.endswith(".py") for name, _ in rest.files),
    }
    return Contents(tuple(items), None, rest.left_out, (*rest.warnings, *warnings), facts)


def _safetensors(root: Path) -> list[str]:
    """The files of weights in a folder without ZeRO states: one, or an index and its shards."""
    if (root / INDEX).is_file() and refusal(root, INDEX) is None:
        shards = safetensors.shard_names(root / INDEX)
        if other := [name for name in shards if not name.endswith(".safetensors")]:
            raise CheckpointError(
                f"{root / INDEX} names {other[0]}, no safetensors file", "refused"
            )
        return [INDEX, *shards]
    if not os.path.lexists(root / WEIGHTS):
        raise CheckpointError(
            f"{root} has neither {WEIGHTS} nor {INDEX}; expected one, as pickles are not published",
            "incomplete",
        )
    return [WEIGHTS]


def _most(tensors: Iterable[TensorRef]) -> DType:
    """The floating-point type of most bytes."""
    totals: Counter[DType] = Counter()
    for ref in tensors:
        if ref.dtype.floating:
            totals[ref.dtype] += ref.nbytes
    return max(totals, key=lambda dtype: totals[dtype], default=DType.F32)


def _beside(checkpoint: Checkpoint, rest: Allowed) -> Iterator[Item]:
    """The files beside the weights, each with what the manifest says of it, if anything."""
    files = checkpoint.manifest.files if checkpoint.manifest else {}
    for name, path in rest.files:
        yield Item(name, path, files.get(name) if path.parent == checkpoint.folder else None)


def _with_card(found: Contents, root: Path, repo: str | None, revision: str | None) -> Contents:
    """The same with a model card, and a picture of the losses where there are some."""
    training, evaluation = known.losses(root)
    picture = curve(training, evaluation)
    facts = {**found.facts, "repo": repo, "revision": revision}
    text = cards.card(facts, training, evaluation, cards.PICTURE if picture else None)
    made = [Item(CARD, text), *([Item(cards.PICTURE, picture)] if picture else [])]
    names = tuple(item.name for item in made)
    return replace(found, items=(*found.items, *made), made=names)


def _suspicions(root: Path, items: Sequence[Item]) -> Iterator[str]:
    """A line for each thing in the texts to be sent that should perhaps not be public."""
    for item in items:
        if isinstance(item.source, Shard) or not secrets.looked_into(item.name):
            continue
        path = root / item.name if item.name == "config.json" else item.source
        if isinstance(path, bytes):
            where, text = item.name, path
        elif path.stat().st_size <= secrets.LARGEST:
            with named(path):
                where, text = str(path), path.read_bytes()
        else:
            yield f"{path} is too large to be looked through for secrets"
            continue
        for found in secrets.secrets(text):
            yield f"{where}, line {found.line}: looks like {found.kind}; remove it and revoke it"
        key = _BASES.get(item.name)
        if key and re.search(rb'\b%b"?: *["\']?(?:[/~]|[A-Za-z]:\\)' % key.encode(), text):
            yield f"{where}: {key} is a path of this machine; write a name of the Hub there"
