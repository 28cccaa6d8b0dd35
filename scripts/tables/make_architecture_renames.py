"""Makes ckpt/weights/architecture_renames.jsonl: how ``from_pretrained`` renames what it reads.

    python scripts/tables/make_architecture_renames.py

transformers 5 renames the tensors of a file before it looks for them in the model, so that it reads
files with names that no model of its own has: those that transformers 4 ran with (``vision_tower.
vision_model.`` of CLIP), and older ones. The rules are its own (5.23 conversion_mapping.py:
get_model_conversion_mapping), those of each class in the order in which they are applied. Rules
that join or merge tensors are left out: which of the tensors are missing cannot be told after them.
"""

from __future__ import annotations

import json
import sys
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from architecture_builds import classes, start  # noqa: E402

TABLE = ROOT / "ckpt" / "weights" / "architecture_renames.jsonl"
PROCESSES = 2
_CLASSES = classes()


def rules_of(name: str) -> tuple[str, list[list[Any]]]:
    """The rules of a class, none where it cannot be built or renames nothing of its own."""
    torch.set_num_threads(1)
    try:
        _, built = start(_CLASSES[name])
        transforms = get_model_conversion_mapping(built.model, add_legacy=False)
    except Exception as error:
        print(f"{name} left out: {type(error).__name__}", file=sys.stderr)
        return name, []

    return name, [rule for transform in transforms if (rule := rule_of(transform)) is not None]


def rule_of(transform: Any) -> list[Any] | None:
    """[the prefixes of the names it is for, pattern, new texts]; ``None`` for what merges."""
    if type(transform) in (WeightRenaming, PrefixChange):
        targets = transform.target_patterns[:1]
    elif type(transform) is WeightConverter and len(transform.source_patterns) == 1:
        targets = transform.target_patterns
        if "*" in transform.source_patterns[0]:
            return None
    else:
        return None

    scopes = None
    if transform.scope_prefix is not None:
        scope = f"{transform.scope_prefix}." if transform.scope_prefix else ""
        base = f"{transform.base_model_prefix}." if transform.base_model_prefix else ""
        scopes = [base + scope, scope]
    return [scopes, transform.compiled_sources.pattern, targets]


def main() -> int:
    """Writes the table."""
    names = sorted(name for name in _CLASSES if not name.endswith("Backbone"))
    lists: list[list[Any]] = []
    numbers: dict[str, int] = {}
    with Pool(PROCESSES, maxtasksperchild=50) as pool:
        for name, rules in pool.imap(rules_of, names, chunksize=4):
            if rules:
                if rules not in lists:
                    lists.append(rules)
                numbers[name] = lists.index(rules)

    content = {"transformers": transformers.__version__, "classes": numbers}
    head = json.dumps(content, separators=(",", ":"))
    lines = [json.dumps(rules, separators=(",", ":")) for rules in lists]
    TABLE.write_text("\n".join([head, *lines]) + "\n")
    print(f"{len(numbers)} classes, {len(lists)} lists of rules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
