"""Which files go to LFS: by .gitattributes, by size, by the sample of their bytes."""

from __future__ import annotations

from pathspec import GitIgnoreSpec

REGULAR_LIMIT = 10 * 1024 * 1024  # bytes: a larger file must be an LFS file
LFS = "filter=lfs diff=lfs merge=lfs -text"
PATTERNS = (
    "*.7z",
    "*.arrow",
    "*.bin",
    "*.bz2",
    "*.ckpt",
    "*.ftz",
    "*.gz",
    "*.h5",
    "*.joblib",
    "*.lfs.*",
    "*.mlmodel",
    "*.model",
    "*.msgpack",
    "*.npy",
    "*.npz",
    "*.onnx",
    "*.ot",
    "*.parquet",
    "*.pb",
    "*.pickle",
    "*.pkl",
    "*.pt",
    "*.pth",
    "*.rar",
    "*.safetensors",
    "saved_model/**/*",
    "*.tar.*",
    "*.tar",
    "*.tflite",
    "*.tgz",
    "*.wasm",
    "*.xz",
    "*.zip",
    "*.zst",
    "*tfevents*",
)
INITIAL = "".join(f"{pattern} {LFS}\n" for pattern in PATTERNS)


def lfs_spec(attributes: str) -> GitIgnoreSpec:
    lines = (line.split() for line in attributes.splitlines())
    return GitIgnoreSpec.from_lines(words[0] for words in lines if "filter=lfs" in words)


def is_lfs(path: str, size: int, sample: bytes, attributes: GitIgnoreSpec) -> bool:
    if size == 0:
        return False
    if attributes.match_file(path) or size > REGULAR_LIMIT:
        return True
    return b"\0" in sample or not _text(sample)


def _text(sample: bytes) -> bool:
    for cut in range(4):  # a sample may end within a character
        try:
            sample[: len(sample) - cut].decode()
            return True
        except UnicodeDecodeError:
            continue
    return False


def with_lfs(attributes: str, paths: list[str]) -> str:
    """.gitattributes with a line for every LFS file that no pattern names, as the Hub adds them."""
    spec, lines = lfs_spec(attributes), attributes.splitlines()
    for path in paths:
        line = f"{path.replace(' ', '[[:space:]]')} {LFS}"
        if not spec.match_file(path) and line not in lines:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)
