"""The installed transformers is asked: it builds the model without weights.

It runs in a process of its own, so that the conversion itself never imports torch. The
model is built on the meta device from config.json; code beside it (auto_map) is never
run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ckpt.text import size
from ckpt.weights.reader import renames
from ckpt.weights.reader.audience import StoredShapes
from ckpt.weights.reader.fit import Fit
from converters.errors import CheckpointError
from converters.options import CHECK
from converters.tensors import Weights

TIMEOUT_SECONDS = 120
MAX_MESSAGE_CHARACTERS = 300  # of what transformers says, which may list all types of models

# What building may take, beyond the libraries themselves. On the meta device a model of
# 61 layers with 256 experts each, one module an expert, takes 0.4 GiB.
MAX_BUILD_BYTES = 2 << 30
MAX_ANSWER_CHARACTERS = 256 << 20
_SIGNS_OF_SHORTAGE = (
    *("SystemError", "bad_alloc", "annot allocate memory", "failed to map segment", "[Errno 12]"),
    *("out of memory", "can't start new thread"),
)

# Reads config.json on stdin; answers with the class, and the name and shape of each
# tensor in memory and as save_pretrained names it. Its arguments are the two limits
# above.
_CHILD = """
import json, sys, warnings
warnings.filterwarnings("ignore")
try:
    import torch, transformers
except ModuleNotFoundError as error:
    print(json.dumps({"lacks": error.name}))
    sys.exit()
transformers.logging.set_verbosity_error()

def limit_memory(size):
    # so many bytes more than the process has now, where the system can do that
    try:
        import resource
        with open("/proc/self/status") as status:
            data = next(line for line in status if line.startswith("VmData:"))
    except (ImportError, OSError):
        return
    limit = (int(data.split()[1]) << 10) + size
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

limit_memory(int(sys.argv[1]))
content = json.load(sys.stdin)
kind = content.pop("model_type", "")
config = transformers.AutoConfig.for_model(kind, **content)
name = (content.get("architectures") or [None])[0]
cls = getattr(transformers, name or "", None)
with torch.device("meta"):
    if cls is None:
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    else:
        model = cls(config)
state = {n: t for n, t in model.state_dict().items() if hasattr(t, "shape")}
hub = state
try:
    from transformers.core_model_loading import revert_weight_conversion
    hub = revert_weight_conversion(model, dict(state))
except Exception:
    pass
if hasattr(model, "all_tied_weights_keys"):
    tied = list(model.all_tied_weights_keys)
else:  # transformers 4
    tied = list(getattr(model, "_tied_weights_keys", None) or ())
    tied = tied if getattr(config, "tie_word_embeddings", True) else []
answer = json.dumps({
    "version": transformers.__version__,
    "class": type(model).__name__,
    "prefix": model.base_model_prefix,
    "memory": {n: list(t.shape) for n, t in state.items()},
    "hub": {n: list(t.shape) for n, t in hub.items()},
    "tied": tied,
    "missing": list(map(str, model._keys_to_ignore_on_load_missing or ())),
    "unexpected": list(map(str, model._keys_to_ignore_on_load_unexpected or ())),
})
if len(answer) > int(sys.argv[2]):
    raise MemoryError(f"{len(state)} tensors are more than can be listed")
print(answer)
"""


class NoAnswerError(CheckpointError):
    """Says why there is no answer: no transformers, or no model that it can build."""

    def __init__(self, message: str):
        super().__init__(message, "unloadable")


def ask(config: Mapping[str, Any], cls: str | None = None) -> dict[str, Any]:
    """Returns what transformers answers for a configuration, or for its class ``cls``.

    ``NoAnswerError`` if transformers cannot build the model, or is not installed.
    """
    process = _run(json.dumps(dict(config) | ({"architectures": [cls]} if cls else {})))
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        reason = _reason(process.returncode, process.stderr)
        raise NoAnswerError(
            f"{CHECK('transformers')}: transformers cannot build the model of config.json: "
            f"{reason}",
        )

    answer: dict[str, Any] = json.loads(lines[-1])
    if "lacks" in answer:
        raise NoAnswerError(
            f"{CHECK('transformers')}: {answer['lacks']} is not installed beside "
            f"{sys.executable}; install transformers and torch there, or leave the option "
            "out",
        )

    return answer


def _run(config: str) -> subprocess.CompletedProcess[str]:
    """The process that builds,
    at its end; ``NoAnswerError`` if it has none or no beginning."""
    try:
        return subprocess.run(
            [sys.executable, "-c", _CHILD, str(MAX_BUILD_BYTES), str(MAX_ANSWER_CHARACTERS)],
            input=config,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(
            f"{CHECK('transformers')}: transformers did not build the model in {TIMEOUT_SECONDS} s",
        ) from error
    except OSError as error:
        raise NoAnswerError(
            f"{CHECK('transformers')}: {sys.executable} cannot be run: {error.strerror or error}",
        ) from error


def _reason(exit_code: int, errors: str) -> str:
    """Why the process has no answer:
    that memory is short, or the last line of what it said.

    Where memory is short, Python may be at a loss for its own error: an extension
    returns none ("SystemError: ... returned NULL without setting an exception"), a
    library is not mapped, or the process dies of a signal.
    """
    line = (errors.strip().splitlines() or ["no answer"])[-1]
    if line.startswith("MemoryError") or "DefaultCPUAllocator: can't allocate" in line:
        return f"without any weights it takes more than {size(MAX_BUILD_BYTES)} of memory"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else "a signal"
        return f"its process was ended by {name}, which happens where memory is short"
    if any(sign in line for sign in _SIGNS_OF_SHORTAGE):
        return (
            f"memory is short, or it takes more than {size(MAX_BUILD_BYTES)}: {_short_line(line)}"
        )

    return _short_line(line)


def _short_line(line: str) -> str:
    """A line with a length that a message may have."""
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else f"{line[:MAX_MESSAGE_CHARACTERS]}..."


def fits(answer: Mapping[str, Any]) -> tuple[StoredShapes, ...]:
    """The names that the model wants: in memory, and as they are stored."""
    version = f"transformers {answer['version']}"
    forms = []
    for which in ("memory", "hub"):
        shapes = {name: tuple(shape) for name, shape in answer[which].items()}
        forms.append(StoredShapes(version, shapes))

    return tuple(forms)


def bridged(names: list[str], shapes: Mapping[str, Any], prefix: str) -> list[str]:
    """The names as ``from_pretrained`` reads them, with or without the base's prefix.

    This follows rename_source_key in core_model_loading.py of transformers 5.23.
    """
    if not prefix:
        return names

    new_names = []
    for name in names:
        shorter = name.removeprefix(f"{prefix}.")
        longer = f"{prefix}.{name}"
        new_names.append(shorter if shorter in shapes else longer if longer in shapes else name)

    return new_names


def mismatched(answer: Mapping[str, Any], form: StoredShapes, weights: Weights) -> list[str]:
    """The names of tensors that have another shape in the model."""
    names = list(weights.tensors)
    read = bridged(names, form.shapes, answer.get("prefix") or "")

    return [
        name
        for name, new in zip(names, read, strict=True)
        if form.shapes.get(new, weights.tensors[name].shape) != weights.tensors[name].shape
        and name not in weights.packed
    ]


def best(answer: Mapping[str, Any], names: list[str]) -> tuple[StoredShapes, Fit]:
    """The form of the names that fits better, and how it does."""
    import re

    prefix = answer.get("prefix") or ""
    ignored_pattern = re.compile("|".join(answer["unexpected"]) or r"(?!)")
    spare_pattern = re.compile("|".join(answer["missing"]) or r"(?!)")
    tied = set(answer["tied"])
    candidates = []
    for form, sources in _candidates(answer, names):
        fit = form.fit(bridged(list(sources), form.shapes, prefix))
        fit.unexpected = [sources.get(name, name) for name in fit.unexpected]
        fit.missing = [n for n in fit.missing if n not in tied and not spare_pattern.search(n)]
        fit.unexpected = [n for n in fit.unexpected if not ignored_pattern.search(n)]
        required = [n for n in form.shapes if n not in tied and not spare_pattern.search(n)]
        fit.lost_members, fit.empty = _of_whole_members(required, frozenset(fit.missing))
        candidates.append((form, fit))

    return min(candidates, key=lambda pair: pair[1].cost)


def _candidates(
    answer: Mapping[str, Any], names: list[str]
) -> list[tuple[StoredShapes, Mapping[str, str]]]:
    """Forms of names, each with the names to look for and what they are in the output.

    The last is of names that ``from_pretrained`` renames, such as those of transformers
    4.
    """
    memory, hub = fits(answer)
    own_names = {name: name for name in names}
    renamed_names = renames.renamed(str(answer["class"]), names)
    if renamed_names is None:
        return [(memory, own_names), (hub, own_names)]

    return [(memory, own_names), (hub, own_names), (memory, renamed_names)]


def _of_whole_members(required: list[str], missing: frozenset[str]) -> tuple[list[str], list[str]]:
    """The names of members of numbered lists of which all is missing.

    The first list is of members beside which others are there, the second of lists that
    have none.
    """
    lists: dict[str, dict[str, list[str]]] = {}
    for name in required if missing else ():
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdigit():
                members = lists.setdefault(".".join(parts[:place]), {})
                members.setdefault(part, []).append(name)

    lost_members, empty = dict[str, None](), dict[str, None]()
    for members in lists.values():
        if set(members) != set(map(str, range(len(members)))):
            continue
        lost_names = [names for names in members.values() if missing.issuperset(names)]
        several = [name for names in lost_names if len(names) > 1 for name in names]
        (empty if len(lost_names) == len(members) else lost_members).update(dict.fromkeys(several))

    return list(lost_members), list(empty)
