"""Makes ckpt/weights/hub_layouts.jsonl: how ``save_pretrained`` renames and cuts what it writes.

    python scripts/tables/make_hub_layouts.py            all classes, some minutes
    python scripts/tables/make_hub_layouts.py --check    does ckpt write what transformers writes?
    python scripts/tables/make_hub_layouts.py --check MixtralForCausalLM ...

transformers 5 runs some models with other names and shapes than their files have: the experts of a
Mixtral are one tensor in memory and one tensor each on the Hub. ``save_pretrained`` goes back by
rules that it keeps for reading (5.23 conversion_mapping.py: get_model_conversion_mapping;
core_model_loading.py: revert_weight_conversion). They are written down here in that direction, in
the order in which they are applied. A ``PrefixChange`` is left out, as it is for a model that was
not read from a file. A class whose files ckpt would not write as transformers does, or of which
that cannot be proven (``layout_proofs``), is left out of the table.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    GroupWeightRename,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)
from transformers.models.auto import modeling_auto

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from architecture_builds import classes, start  # noqa: E402
from layout_proofs import Proof, prove  # noqa: E402

from ckpt.weights.reader import entries  # noqa: E402

TABLE = ROOT / "ckpt" / "weights" / "hub_layouts.jsonl"
PROCESSES = 1
_CLASSES = classes()
_INSIDE: dict[
    str, dict[str, Any]
] = {  # the classes that a model may have inside, by what makes them
    "base": dict(modeling_auto.MODEL_MAPPING_NAMES),
    "causal": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}

Rules = list[list[Any]]


def layout_of(name: str) -> tuple[str, dict[str, Any]]:
    """What the table says of a class; nothing where it cannot be built."""
    torch.set_num_threads(1)
    try:
        _, built = start(_CLASSES[name])
        transforms = get_model_conversion_mapping(built.model, add_legacy=False)
    except Exception as error:
        print(f"{name} left out: {type(error).__name__}", file=sys.stderr)
        return name, {}

    model, scopes = built.model, dict[str | None, Rules]()
    for transform in reversed([each for each in transforms if not isinstance(each, PrefixChange)]):
        scopes.setdefault(transform.scope_prefix, []).append(rule_of(transform, model))

    return name, {
        "prefix": model.base_model_prefix,
        "scopes": list(scopes.items()),
        "parts": dict(variable_parts(model.config)) | dict(parts_of(model)),
    }


def rule_of(transform: Any, model: Any) -> list[Any]:
    """[kind, pattern, its sources, new texts, operations or the offset of an index]."""
    reverse = transform.reverse_transform()
    known = (WeightRenaming, GroupWeightRename, WeightConverter)
    if type(reverse) in known:
        kind = {WeightRenaming: "rename", GroupWeightRename: "group"}.get(type(reverse), "convert")
    else:
        kind = type(reverse).__name__

    details: Any = getattr(reverse, "offset", None)
    if isinstance(reverse, WeightConverter):
        details = [operation_of(operation, model) for operation in reverse.operations]

    return [
        kind,
        reverse.compiled_sources.pattern,
        list(reverse.source_patterns),
        list(reverse.target_patterns),
        details,
    ]


def operation_of(operation: Any, model: Any) -> list[Any]:
    """[name of the operation, its numbers]; of one that asks the configuration, the field."""
    name, values = type(operation).__name__, dict(vars(operation))
    if name == "PermuteForRope":
        part, chosen = values["subconfig_key"], values["permute_layer_names"]
        return [name, field_of(model.config, part, "num_attention_heads"), chosen]
    if values.get("num_shards_attribute"):
        config = model.config.get_text_config()
        parts = [key for key in model.config.sub_configs if getattr(model.config, key) is config]
        part = parts[0] if parts else None
        field = field_of(model.config, part, values["num_shards_attribute"])
        return [name, values["dim"], field]

    numbers = [value for key, value in values.items() if key != "num_shards_attribute"]
    return [name, *numbers]


def field_of(config: Any, part: str | None, name: str) -> list[Any]:
    """[where config.json has a number, the number where it says nothing]."""
    owner = getattr(config, part, None) if part else config
    path = f"{part}." if owner is not None and part else ""
    owner = config if owner is None else owner
    field = getattr(owner, "attribute_map", {}).get(name, name)
    return [path + field, getattr(type(owner)(), name, 1)]


def variable_parts(config: Any, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The fields that may be of any type, with their type by default.

    The rules of what is there instead are not known, unless ``parts_of`` has the field.
    """
    for field, part_class in type(config).sub_configs.items():
        part = getattr(config, field, None)
        if part_class is AutoConfig:
            written_type = None if part is None else part.to_dict().get("model_type")
            yield prefix + field, [written_type, [], None]
        if part is not None:
            yield from variable_parts(part, f"{prefix}{field}.")


def parts_of(model: Any) -> Iterator[tuple[str, list[Any]]]:
    """The models inside by their field: type, where they are, and which kind of class."""
    for field in model.config.sub_configs:
        config: Any = getattr(model.config, field, None)
        places = [
            (place, type(module).__name__)
            for place, module in model.named_modules()
            if place and isinstance(module, PreTrainedModel) and module.config is config
        ]
        outer = [
            (place, name)
            for place, name in places
            if not any(place.startswith(f"{other}.") for other, _ in places)
        ]
        kinds = {
            kind
            for _, name in outer
            for kind, names in _INSIDE.items()
            if names.get(config.model_type) == name
        }
        if outer and len(kinds) == 1:
            yield field, [config.model_type, [place for place, _ in outer], kinds.pop()]


def table_of(layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The table; lists of rules that are alike are kept once."""
    lists: list[Rules] = []
    entries_by_name: dict[str, Any] = {}
    for name, layout in sorted(layouts.items()):
        scopes = []
        for scope, rules in layout["scopes"]:
            if rules not in lists:
                lists.append(rules)
            scopes.append([scope, lists.index(rules)])
        entries_by_name[name] = [layout["prefix"], scopes, layout["parts"]]

    bases = {
        kind: {of: each for of, each in names.items() if each in entries_by_name}
        for kind, names in _INSIDE.items()
    }
    content = {"transformers": transformers.__version__, "inside": bases}
    return content | {"classes": entries_by_name, "rules": lists}


def proofs_of(names: list[str]) -> Iterator[Proof]:
    """The proof of each class, in order; a line for each that does not hold."""
    with Pool(PROCESSES, maxtasksperchild=50) as pool:
        for proof in pool.imap(prove, names, chunksize=4):
            if not proof.holds:
                print(f"{proof.name}: {proof.difference}", flush=True)
            yield proof


def check(names: list[str]) -> int:
    """Compares what ckpt writes of each class with what transformers writes; the exit code.

    It is 1 where one differs, and where one of the table cannot be compared.
    """
    counts: Counter[str] = Counter()
    wrong = 0
    for proof in proofs_of(names):
        counts[proof.compared] += 1
        wrong += not proof.holds

    compared = ", ".join(f"{count} by {kind}" for kind, count in counts.most_common())
    print(f"{len(names)} classes ({compared}), {wrong} not proven, {transformers.__version__}")
    return 1 if wrong else 0


def main() -> int:
    """Writes the table, or checks it."""
    wishes = [name for name in sys.argv[1:] if not name.startswith("-")]
    if "--check" in sys.argv:
        return check(wishes or sorted(json.loads(TABLE.open().readline())["classes"]))

    names = sorted(name for name in wishes or _CLASSES if not name.endswith("Backbone"))

    with Pool(PROCESSES, maxtasksperchild=50) as pool:
        layouts = {name: layout for name, layout in pool.imap(layout_of, names) if layout}

    write(layouts)
    ruled_names = [name for name, layout in layouts.items() if any(r for _, r in layout["scopes"])]
    unproven_names = {proof.name for proof in proofs_of(ruled_names) if not proof.holds}
    write({name: layout for name, layout in layouts.items() if name not in unproven_names})
    return 0


def write(layouts: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the table of these classes."""
    table = table_of(layouts)
    text = entries.text(table, "rules")
    TABLE.write_text(text)
    print(f"{len(table['classes'])} classes, {len(table['rules'])} lists, {len(text):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
