"""Makes ckpt/weights/architecture_fields.jsonl: what fields of config.json decide of each class.

    python scripts/tables/make_architecture_fields.py                 all classes of the table
    python scripts/tables/make_architecture_fields.py BertModel ...   these, added to the file

``ties``      whether the configuration of the class ties weights where it does not say
``switches``  {field: [default, names there if it is set, names there if it is not]}
``other_names``  {name: field}: other names under which config.json may state a field
``sizes``     {field: [default, [[name, dimension], ...]]}: dimensions that are as long as it says

A number in a name is ``*``; the names of switches are grouped by their modules. Every class is
built on the meta device, small, and once more for each field with another value.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import architecture_builds  # noqa: E402
from architecture_builds import (  # noqa: E402
    Build,
    alternatives,
    build,
    classes,
    fields_of,
    own_defaults,
    start,
)
from try_architectures import ARCHITECTURES  # noqa: E402

from ckpt.weights.reader import entries, table  # noqa: E402
from ckpt.weights.reader import fields as reader_fields  # noqa: E402

TARGET = ROOT / "ckpt" / "weights" / "architecture_fields.jsonl"
PROCESSES = 2
MOST_SWITCHED = 60  # names that one field may switch; more is another model
MOST_SIZED = 3  # names that prove one size
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_decoder_layers")
LAYERS += ("encoder_layers", "decoder_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES = ("hidden_size", "d_model", "n_embd", "dim", "intermediate_size", "ffn_dim", "d_ff")
SIZES += ("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", *EXPERTS)
OTHERS = ("head_dim",)  # sizes that only tell which dimensions are of no other field
UNLIKE = re.compile(r"^(output_|norm_topk|scale_|return_|use_sliding|rope_|router_|do_sample)")
_CLASSES = classes()


def form(name: str) -> str:
    """A name with ``*`` for each number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def forms(made: Build) -> set[str]:
    """The forms of the names, those in memory and those that are stored."""
    return set(map(form, (*made.memory, *made.hub)))


class Fields:
    """What the fields of one class decide."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        settings, self.made = start(cls)
        self.fields = list(fields_of(cls.config_class))
        self.own = own_defaults(cls.config_class)
        self.small = self._small(dict(settings))
        self.hub = self.made.hub.keys() != self.made.memory.keys()
        self.base = self._built({}) or self.made

    def _small(self, settings: dict[str, Any]) -> dict[str, Any]:
        small = dict(settings)
        for path, value, _ in self.fields:
            name = path.rpartition(".")[2]
            if type(value) is int and path not in small:
                small |= {path: 4} if name in LAYERS and value > 4 else {}
                small |= {path: 8} if name in EXPERTS and value > 8 else {}
        try:
            build(self.cls, small, False)
        except Exception:
            return settings
        return small

    def _built(self, change: Mapping[str, Any]) -> Build | None:
        try:
            return build(self.cls, {**self.small, **change}, self.hub)
        except Exception:
            return None

    def switches(self) -> Iterator[tuple[str, list[Any]]]:
        """The fields that switch names on or off."""
        before = forms(self.base)
        for path, value, kind in self.fields:
            if isinstance(value, int) and not isinstance(value, bool):
                others = [None] if None in alternatives(path, value, kind) else []
            elif value is None or isinstance(value, bool):
                others = alternatives(path, value, kind)[:1]
            else:
                continue
            if UNLIKE.match(path.rpartition(".")[2]):
                continue
            for other in others:
                made = self._built({path: other})
                if made is None:
                    continue
                after = forms(made)
                more, less = sorted(after - before), sorted(before - after)
                if 0 < len(more) + len(less) <= MOST_SWITCHED:
                    there, elsewhere = (less, more) if value else (more, less)
                    yield path, [self._unstated(path, value, other), there, elsewhere]

    def _unstated(self, path: str, value: Any, other: Any) -> Any:
        """The value of a field where config.json states its part, and not the field."""
        if path in self.own:
            return self.own[path]
        settings = {key: each for key, each in self.small.items() if key != path}
        try:
            names = forms(build(self.cls, settings, self.hub))
        except Exception:
            return value
        return value if names == forms(self.base) else other

    def sizes(self) -> Iterator[tuple[str, list[Any]]]:
        """The fields that some dimensions are as long as."""
        moved: dict[str, tuple[Any, set[tuple[str, int]], set[tuple[str, int]]]] = {}
        before = _shapes(self.base)
        for path, value, _ in self.fields:
            if path.rpartition(".")[2] not in (*SIZES, *OTHERS):
                continue
            small = self.small.get(path, value)
            number = small if type(small) is int else 64
            made = self._built({path: number * 2})
            if made is None:
                continue
            after = _shapes(made)
            changed, equal = set[tuple[str, int]](), set[tuple[str, int]]()
            for name, shape in before.items():
                if len(after.get(name, ())) != len(shape):
                    continue
                for place, size in enumerate(shape):
                    if after[name][place] != size:
                        changed.add((name, place))
                        if (size, after[name][place]) == (number, 2 * number):
                            equal.add((name, place))
            moved[path] = value, changed, equal
        for path, (value, _, equal) in moved.items():
            if path.rpartition(".")[2] in OTHERS:
                continue
            others = [changed for other, (_, changed, _) in moved.items() if other != path]
            own = sorted(equal.difference(*others), key=lambda each: (*_rank(each[0]), *each))
            if own:
                yield path, [value, [list(each) for each in own[:MOST_SIZED]]]


def _shapes(made: Build) -> dict[str, tuple[int, ...]]:
    """The shape of each form of names that has one shape, as it is in memory and stored."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for names in (made.memory, made.hub):
        for name, shape in names.items():
            found.setdefault(form(name), set()).add(shape)
    return {name: next(iter(each)) for name, each in found.items() if len(each) == 1}


def _rank(name: str) -> tuple[bool, bool]:
    """First what every model has: embeddings, norms."""
    return "embed" not in name and "wte" not in name, "norm" not in name


def other_names(config_class: Any, prefix: str = "") -> dict[str, str]:
    """Names under which config.json may state a field, and the field's own."""
    found = {prefix + n: prefix + own for n, own in config_class.attribute_map.items()}
    for name, part in config_class.sub_configs.items():
        found |= other_names(part, f"{prefix}{name}.") if hasattr(part, "sub_configs") else {}
    return found


def learn(name: str) -> tuple[str, dict[str, Any] | str]:
    """What the file says of a class, or why nothing."""
    torch.set_num_threads(1)
    architecture_builds.SECONDS = 30
    try:
        fields = Fields(_CLASSES[name])
        found = {
            "ties": bool(fields.made.tied),
            "other_names": other_names(_CLASSES[name].config_class),
            "switches": dict(fields.switches()),
            "sizes": dict(fields.sizes()),
        }
    except Exception as error:
        return name, f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    return name, {key: value for key, value in found.items() if value not in ({}, [])}


def read() -> dict[str, dict[str, Any]]:
    """What the file says now, by class."""
    if not TARGET.is_file():
        return {}
    content = entries.read(TARGET, "facts")
    facts = content["facts"]
    return {
        name: {
            key: _changed(key, facts[number], reader_fields.spread) for key, number in entry.items()
        }
        for name, entry in content["classes"].items()
    }


def grouped(names: list[str]) -> dict[str, str]:
    """Names by what their modules are in, with the ends of them; ``spread`` is the reverse."""
    groups: dict[str, list[str]] = {}
    for name in names:
        module, _, end = name.rpartition(".")
        place, _, own = module.rpartition(".")
        groups.setdefault(place, []).append(f"{own}.{end}" if own else end)
    return {module: " ".join(ends) for module, ends in groups.items()}


def _changed(key: str, value: Any, change: Callable[[Any], Any]) -> Any:
    """A fact with the names of its switches in another form."""
    if key != "switches":
        return value
    return {
        path: [default, change(there), change(elsewhere)]
        for path, (default, there, elsewhere) in value.items()
    }


def write(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the file; equal values stand in it once."""
    facts: list[Any] = []
    numbers: dict[str, int] = {}
    known: dict[str, dict[str, int]] = {}
    for name in sorted(found):
        entry = known[name] = {}
        for key, fact in found[name].items():
            value = _changed(key, fact, grouped)
            text = json.dumps(value, separators=(",", ":"))
            if text not in numbers:
                numbers[text] = len(facts)
                facts.append(value)
            entry[key] = numbers[text]
    content = {"transformers": table.version(), "classes": known, "facts": facts}
    TARGET.write_text(entries.text(content, "facts"))


def order(name: str) -> tuple[bool, bool, str]:
    """First what people train most."""
    often = ("ForCausalLM", "ForConditionalGeneration", "ForSequenceClassification")
    return name not in ARCHITECTURES, not name.endswith(often), name


def main() -> int:
    wishes = sys.argv[1:]
    known = {n for types in table._table()["types"].values() for n in types}
    names = wishes or sorted(known & _CLASSES.keys(), key=order)
    found = read() if wishes else {}
    with Pool(PROCESSES, maxtasksperchild=50) as pool:
        for number, (name, facts) in enumerate(pool.imap(learn, names, chunksize=1)):
            if isinstance(facts, str):
                print(f"not in the file: {name}: {facts}", flush=True)
                continue
            found[name] = facts
            if number % 50 == 0:
                write(found)
                print(number, len(names), flush=True)
    write(found)
    print(f"{len(found)} classes, {TARGET.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
