"""What makes weights a model folder: the files that ``from_pretrained`` wants beside them."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from converters import bounded_json
from converters.errors import CheckpointError
from converters.plan import Tied
from converters.tensors import DType, Weights

# What save_pretrained of models, tokenizers and processors writes (transformers 4 and 5).
_WANTED = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "*.spm",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "image_processor*.json",
    "feature_extractor*.json",
    "*.py",
)
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")  # DeepSpeed leaves them in every save_dir
_NAMES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16", DType.F64: "float64"}


def companions(root: Path) -> list[Path]:
    """The files of ``root`` to copy beside the weights, by an allow list; not config.json.

    Optimizer, scheduler, RNG and trainer state and ``training_args.bin`` are never among them.
    """
    files = [path for path in sorted(root.iterdir()) if path.is_file()]
    found = [
        path
        for path in files
        if path.name not in _SCRIPTS and any(fnmatch(path.name, form) for form in _WANTED)
    ]
    for path in sorted((root / "additional_chat_templates").glob("*.jinja")):
        found.append(path)
    return found


def config(root: Path, dtype: DType) -> bytes | None:
    """``config.json`` with the type of the weights set to ``dtype``; ``None`` where there is none.

    Nested configurations (vision, text) that state a type are set too. ``CheckpointError`` if the
    file is no JSON object.
    """
    path = root / "config.json"
    if not path.is_file():
        return None
    content = _object(path)
    _set_dtype(content, _NAMES[dtype])
    if not {"dtype", "torch_dtype"} & content.keys():
        content["dtype"] = _NAMES[dtype]
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _object(path: Path) -> dict[str, Any]:
    try:
        content = bounded_json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _set_dtype(content: dict[str, Any], name: str) -> None:
    for key, value in content.items():
        if key in ("dtype", "torch_dtype"):
            content[key] = name
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            _set_dtype(value, name)


def tied_default(root: Path, weights: Weights) -> Tied:
    """Whether ``from_pretrained`` of this model expects tied names to be left out.

    ``tie_word_embeddings`` of config.json tells, true where not stated (the Trainer's own 16-bit
    file does not: under ZeRO-2 it holds tied weights twice). Without a config a plain
    ``load_state_dict`` is next, which wants every name.
    """
    if not weights.aliases:
        return "keep"
    path = root / "config.json"
    if not path.is_file():
        return "keep"
    return "drop" if ties(_object(path)) else "keep"


def ties(config: dict[str, Any]) -> bool:
    """Whether a model's configuration ties its embeddings; true where it does not say."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", True) if isinstance(text, dict) else True
    return config.get("tie_word_embeddings", inner) is not False
