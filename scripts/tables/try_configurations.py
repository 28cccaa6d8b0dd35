"""Varies fields of config.json: is what is said of the names so?

    python scripts/tables/try_configurations.py                 the architectures of ARCHITECTURES
    python scripts/tables/try_configurations.py BertModel ...   these

For each class: a tiny model on the meta device, then one more for each field that counts layers
(one more, one less) and each that is true or false, if it changes which names there are. Headers
only. Each is asked with its own config.json, with the names of the other one, and the reverse; what
is said is compared with the names that the model on the meta device has.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from architecture_builds import Build, build_of, classes, time_limit  # noqa: E402
from try_architectures import ARCHITECTURES, tiny_configuration  # noqa: E402

from ckpt.weights.check.checking import judged  # noqa: E402
from ckpt.weights.companions.surroundings import Surroundings  # noqa: E402
from ckpt.weights.conversion.planning import Product  # noqa: E402
from ckpt.weights.reader import installed  # noqa: E402
from ckpt.weights.reader.audience import Audience  # noqa: E402
from ckpt.weights.reader.fit import Fit  # noqa: E402
from ckpt.weights.request import Request  # noqa: E402
from converters.errors import CheckpointError  # noqa: E402
from converters.tensors import DType, Extent, TensorRef, Weights  # noqa: E402

COUNTS = re.compile(r"layer|depth|block|conv_dim|n_head$|deepstack|nextn")
UNLIKE = re.compile(r"dropout|^layer_?norm_|_eps$|^layers_to|std$|_factor$|^(torchscript|chunk_)")
MOST_PAIRS = 5  # further fields that a field is changed with
BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers")


@dataclass(frozen=True)
class Model:
    """Names and shapes that a configuration gives, and the configuration."""

    made: Build
    config: Mapping[str, Any]

    @property
    def answer(self) -> dict[str, Any]:
        """What ``installed.ask`` would say of it."""
        model = self.made.model
        return {
            "version": transformers.__version__,
            "class": type(model).__name__,
            "prefix": model.base_model_prefix,
            "memory": self.made.memory,
            "hub": self.made.hub,
            "tied": list(model.all_tied_weights_keys),
            "missing": list(map(str, model._keys_to_ignore_on_load_missing or ())),
            "unexpected": list(map(str, model._keys_to_ignore_on_load_unexpected or ())),
        }

    @property
    def weights(self) -> Weights:
        """Its tensors as headers, without those that are tied."""
        parameters = dict(self.made.model.named_parameters(remove_duplicate=False))
        own = {n: s for n, s in self.made.memory.items() if n not in self.made.tied}
        refs = {name: _header(shape) for name, shape in own.items()}
        return Weights(refs, buffers=frozenset(own.keys() - parameters.keys()))


def _header(shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(DType.F32, shape, (Extent(Path("/none"), 0, 4 * math.prod(shape)),))


def model(cls: Any, content: Mapping[str, Any]) -> Model:
    """The model of a configuration, with the config.json that ``save_pretrained`` writes."""
    with time_limit():
        made = build_of(cls, cls.config_class.from_dict(json.loads(json.dumps(content))))
    config = json.loads(made.model.config.to_json_string())
    return Model(made, config | {"architectures": [cls.__name__]})


def variations(
    content: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(what is varied, the fields that change) of a configuration and its parts."""
    for name, value in content.items():
        path = prefix + name
        if isinstance(value, dict) and name.endswith("_config"):
            for what, changed in variations(value, f"{path}."):
                yield what, {**content, name: changed}
        elif UNLIKE.search(name) or name.startswith("output_"):
            continue
        elif isinstance(value, bool):
            yield f"{path}={not value}", {**content, name: not value}
        elif COUNTS.search(name):
            for other in _others(value):
                changed = {k: v for k, v in content.items() if k not in BY_LAYER}
                if "attention_types" in changed and type(other) is int:  # GPT-Neo
                    changed["attention_types"] = [[["global"], other]]
                yield f"{path}={other}", {**changed, name: other}


def _others(value: Any) -> list[Any]:
    if type(value) is int and 0 < value < 40:
        return [value + 1, value - 1] if value > 1 else [value + 1]
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return [value[:-1], [*value[:-1], value[-1] + 1]]
    return []


def truth(wanted: Model, names: list[str]) -> Fit:
    """How names fit a model on the meta device."""
    return installed.best(wanted.answer, names)[1]


def said(weights: Weights, config: Mapping[str, Any]) -> tuple[str, set[str], set[str], str]:
    """(loads, note, refused or not checked; names missing; names not read; the text)."""
    made = Product("model", weights, Surroundings(config, None))
    try:
        verdict = judged(made, Audience(Path("/nonexistent"), config, alone=True), Request())
    except CheckpointError as error:
        return "refused", set(), set(), str(error)
    word = {True: "loads", False: "note", None: "not checked"}[verdict.loads]
    if verdict.unexpected:
        word = "note"
    text = " | ".join((verdict.line, *verdict.notes))
    return word, set(verdict.missing), set(verdict.unexpected), text


def judge(weights: Weights, wanted: Model) -> tuple[str, str]:
    """Whether what is said of weights is so, and a line."""
    fit = truth(wanted, list(weights.tensors))
    missing, unexpected = set(fit.missing), set(fit.unexpected)
    word, less, more, text = said(weights, wanted.config)
    real = f"real: {len(missing)} missing {sorted(missing)[:2]}, {len(unexpected)} unexpected"
    line = f"{word} {text[:420]} || {real} {sorted(unexpected)[:2]}"
    if word == "not checked":
        return word, line
    if not missing and not unexpected:
        return ("right" if word == "loads" else f"false {word}"), line
    if word == "loads":
        return "false loads", line
    if word == "note" and fit.lost_members:
        return "too mild", line
    if word == "note" and not (less <= missing and more <= unexpected):
        return "other names", line
    if word == "note" and (less != missing or more != unexpected):
        return "fewer names", line
    return "right", line


def tried(cls: Any) -> Iterator[tuple[str, str, str]]:
    """(what was varied, whether what is said is right, a line) for each variation of a class."""
    content = tiny_configuration(cls).to_dict()
    base = model(cls, content)
    yield ("base", *judge(base.weights, base))
    telling: list[tuple[str, Mapping[str, Any]]] = []
    for what, changed in variations(content):
        other = _changed(cls, changed, base)
        if other is None:
            continue
        telling.append((what, changed))
        yield (f"{what} own", *judge(other.weights, other))
        yield (f"{what} config.json", *judge(base.weights, other))
        yield (f"{what} names", *judge(other.weights, base))
    switches = [each for each in telling if each[0].endswith(("True", "False"))]
    for number, (first, one) in enumerate(switches):
        for second, other_one in switches[number + 1 : number + 1 + MOST_PAIRS]:
            both = _changed(cls, _both(content, one, other_one), base)
            if both is not None:
                yield (f"{first} {second} own", *judge(both.weights, both))


def _changed(cls: Any, content: Mapping[str, Any], base: Model) -> Model | None:
    """The model of a changed configuration, if there is one and its names are others."""
    try:
        other = model(cls, content)
    except Exception:
        return None
    return None if other.made.memory.keys() == base.made.memory.keys() else other


def _both(base: Any, one: Any, other: Any) -> Any:
    """What either of two changes gives."""
    if not isinstance(base, dict):
        return one if one != base else other
    return {key: _both(base.get(key), one.get(key), other.get(key)) for key in one.keys() | other}


def main() -> int:
    """Prints what is not right of each class; 1 if anything is."""
    torch.set_num_threads(1)
    known = classes()
    names = [each for each in sys.argv[1:] if not each.startswith("-")] or ARCHITECTURES
    words: Counter[str] = Counter()
    for name in names:
        try:
            for what, word, line in tried(known[name]):
                words[word] += 1
                if word != "right" or "-v" in sys.argv:
                    print(f"{word}\t{name}\t{what}\t{line}", flush=True)
        except Exception as error:
            words["not built"] += 1
            print(f"not built\t{name}\t{type(error).__name__}: {str(error)[:100]}", flush=True)
    print(json.dumps(words))
    return 1 if any(word.startswith(("false", "other", "too")) for word in words) else 0


if __name__ == "__main__":
    sys.exit(main())
