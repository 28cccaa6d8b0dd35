"""Makes ckpt/weights/architectures.jsonl: the names that each model of transformers reads.

    python scripts/tables/make_architectures.py          all classes, some minutes
    python scripts/tables/make_architectures.py BertModel ...  these, added to the file
    python scripts/tables/make_architectures.py --check    is what it says still what is built?

Every class is built on the meta device from its own configuration, then from others that differ in
one field. Trees that are alike are kept once. Classes that cannot be built so are not in the table,
and of a model of theirs it is said that its names were not checked.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from architecture_builds import classes, parts_of, start  # noqa: E402
from architecture_trees import Learned, canonical  # noqa: E402

from ckpt.weights.reader import entries  # noqa: E402

TABLE = ROOT / "ckpt" / "weights" / "architectures.jsonl"
PROCESSES = 2
_CLASSES = classes()


def learn(name: str) -> tuple[str, dict[str, Any] | str]:
    """What the table says of a class, or why nothing."""
    torch.set_num_threads(1)
    cls: Any = _CLASSES[name]
    missing = [re.compile(form) for form in cls._keys_to_ignore_on_load_missing or ()]
    try:
        learned = Learned(cls, lambda key: any(form.search(key) for form in missing))
    except Exception as error:
        return name, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"

    model = learned.default.model
    same = canonical(learned.trees["memory"]) == canonical(learned.trees["hub"])
    facts = {
        "type": cls.config_class.model_type,
        "prefix": cls.base_model_prefix,
        "memory": learned.trees["memory"],
        "hub": None if same else learned.trees["hub"],
        "rows": learned.rows,
        "parts": parts_of(model.config),
        "unneeded": sorted(map(str, model._keys_to_ignore_on_load_unexpected or ())),
    }
    return name, {key: value for key, value in facts.items() if value}


class Nodes:
    """Trees by number, each kept once. References under ``FIRST`` are kinds of parameters.

    ``facts`` are other values that classes share, by number too.
    """

    FIRST = 4

    def __init__(self, nodes: Iterable[dict[str, Any]] = (), facts: Iterable[Any] = ()) -> None:
        self.nodes, self.facts = list(nodes), list(facts)
        texts = (json.dumps(dict(sorted(node.items()))) for node in self.nodes)
        self.numbers = {text: number for number, text in enumerate(texts, self.FIRST)}

    def fact(self, value: Any) -> int:
        if value not in self.facts:
            self.facts.append(value)
        return self.facts.index(value)

    def add(self, tree: Any) -> Any:
        if isinstance(tree, int):
            return tree
        if isinstance(tree, list):
            return sorted({self.add(member) for member in tree})
        node = {key: self.add(tree[key]) for key in sorted(tree)}
        text = json.dumps(node)
        if text not in self.numbers:
            self.numbers[text] = len(self.nodes) + self.FIRST
            self.nodes.append(node)
        return self.numbers[text]


def make(
    names: Iterable[str], before: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The table, and the classes that are not in it with why; those of ``before`` stay."""
    nodes, known, left_out = Nodes(), dict[str, Any](), {}
    if before is not None:
        nodes = Nodes(before["nodes"], before["facts"])
        for kind, members in before["types"].items():
            known |= {name: {"type": kind, **facts} for name, facts in members.items()}
    with Pool(PROCESSES, maxtasksperchild=50) as pool:
        for name, facts in pool.imap(learn, sorted(names), chunksize=4):
            if isinstance(facts, str):
                left_out[name] = facts
                continue
            for which in ("memory", "hub"):
                if which in facts:
                    facts[which] = nodes.add(facts[which])
            for which in ("rows", "parts", "unneeded"):
                if which in facts:
                    facts[which] = nodes.fact(facts[which])
            known[name] = facts
    types: dict[str, dict[str, Any]] = {}
    for name, facts in sorted(known.items()):
        types.setdefault(facts.pop("type"), {})[name] = facts
    return {
        "transformers": transformers.__version__,
        "types": dict(sorted(types.items())),
        "facts": nodes.facts,
        "nodes": nodes.nodes,
    }, left_out


def unlike(name: str) -> str | None:
    """How a class of the installed transformers differs from what the table says of it."""
    from ckpt.weights.reader import table

    reader = table.reader_of(name)
    if reader is None:
        return None
    try:
        _, made = start(_CLASSES[name])
    except Exception as error:
        return f"cannot be built: {error!r}"
    content = made.model.config.to_dict()
    for names, tree in ((made.memory, reader.memory), (made.hub, reader.hub)):
        fit = reader.fit_of(tree, names, content)
        if fit.missing or fit.unexpected:
            return f"missing {fit.missing[:3]}, unexpected {fit.unexpected[:3]}"
    return None


def check() -> int:
    """Prints each class that the table is wrong about; the exit code."""
    wrong = 0
    for name in sorted(_CLASSES):
        if (line := unlike(name)) is not None:
            wrong += 1
            print(f"{name}: {line}")
    print(f"{wrong} classes unlike the table")
    return 1 if wrong else 0


def main() -> int:
    if "--check" in sys.argv:
        return check()
    wishes = [name for name in sys.argv[1:] if not name.startswith("-")]
    names = [name for name in wishes or _CLASSES if not name.endswith("Backbone")]  # never alone
    table, left_out = make(names, entries.read(TABLE, "nodes") if wishes else None)
    for name, why in left_out.items():
        print(f"not in the table: {name}: {why}")
    text = entries.text(table, "nodes")
    TABLE.write_text(text)
    count = sum(map(len, table["types"].values()))
    print(f"{count} classes, {len(table['nodes'])} nodes, {len(text):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
