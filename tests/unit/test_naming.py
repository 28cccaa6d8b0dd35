"""Names say what things are: no bare participle or adverb, also of a function, no class name twice.

python tests/unit/test_naming.py       prints what is left, in the form of the tables below
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import syntax_trees

ROOT = Path(__file__).parents[2]
PACKAGES = ("converters", "ckpt")
BARE = {
    *("alike", "asked", "begun", "built", "cut", "dealt", "done", "found", "given", "gone"),
    *("heard", "held", "here", "kept", "known", "laid", "lean", "left", "made", "mine", "most"),
    *("named", "now", "odd", "one", "other", "ours", "own", "passed", "plain", "rest", "said"),
    *("same", "scaled", "seen", "sent", "shown", "taken", "there", "told", "unlike", "wanted"),
    *("whole", "written"),
    *("accounted", "around", "beyond", "both", "claimed", "everything", "flagged", "following"),
    *("heeded", "least", "noted", "offered", "only", "over", "stayed", "thing", "tried"),
    *("unclaimed", "unheeded"),
}
# How many functions, methods and properties a room still has that are called so.
LEFT_FUNCTIONS = {
    "converters": 1,
    "converters/computing": 3,
    "converters/dcp": 1,
    "converters/dcp/keys": 1,
    "converters/dcp/native": 1,
    "converters/dcp/writing": 2,
    "converters/detect": 2,
    "converters/execute": 1,
    "converters/formats": 1,
    "converters/names": 2,
    "converters/peft": 2,
    "converters/peft/merge": 4,
    "converters/quantized": 3,
    "converters/storage/system": 1,
    "converters/torch_files": 2,
    "converters/zero": 1,
    "converters/zero/experts": 1,
    "converters/zero/files": 1,
    "converters/zero/merging": 1,
    "converters/zero/naming": 1,
    "converters/zero/native": 1,
    "converters/zero/parallel": 1,
    "ckpt/engine": 2,
    "ckpt/folders": 1,
    "ckpt/hub": 1,
    "ckpt/hub/content": 1,
    "ckpt/resuming": 4,
    "ckpt/runs": 3,
    "ckpt/runs/foreign": 1,
    "ckpt/runs/lease": 1,
    "ckpt/runs/states": 3,
    "ckpt/saving/commit": 1,
    "ckpt/torch_training": 1,
    "ckpt/weights/layouts": 2,
    "ckpt/weights/merge": 1,
}
# How many a room still has. The numbers may only become smaller: lower one where names went.
LEFT = {
    "ckpt/cli/results": 3,  # keys of JSON
    "ckpt/distributed": 3,
    "ckpt/hub/content": 2,
    "ckpt/live": 2,
    "ckpt/resuming": 2,
    "ckpt/runs": 1,
    "ckpt/runs/lease": 2,
    "ckpt/saving": 2,
    "converters/execute": 5,
    "converters/peft": 1,
    "converters/peft/merge": 8,
    "converters/storage": 1,
    "converters/zero/files": 1,
    "converters/zero/native": 1,
}

COLLECTIONS = {"dict", "frozenset", "list", "set", "sorted", "tuple"}
# How many f-strings that are no messages have a list or a tuple, by module.
RAW = {
    "ckpt/engine/parameters.py": 1,  # a line of a manifest
    "converters/computing/computed.py": 2,  # what is hashed
    "converters/peft/columns.py": 1,  # a recipe, which is hashed
    "converters/peft/merge/vectors.py": 1,  # the same
}


def modules(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path.relative_to(ROOT), syntax_trees.tree(path)


def bound_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The names of variables, arguments, attributes and imports that a module binds, with lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def function_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The names of functions, methods and properties, with lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno


def bare_names(package: str, of_functions: bool = False) -> dict[str, list[str]]:
    """By room, where a bare participle or adverb is a name: ``path:line name``."""
    rooms: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules(package):
        for name, line in function_names(tree) if of_functions else bound_names(tree):
            if name.strip("_") in BARE:
                rooms[path.parent.as_posix()].append(f"{path}:{line} {name}")
    return rooms


def class_names_used_twice() -> set[str]:
    counts = Counter(
        node.name
        for package in PACKAGES
        for _, tree in modules(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    return {name for name, count in counts.items() if count > 1}


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_no_bare_participles_or_adverbs(package: str) -> None:
    for room, places in bare_names(package).items():
        assert len(places) <= LEFT.get(room, 0), "\n".join(places)


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_called_by_a_verb_or_by_what_they_return(package: str) -> None:
    for room, places in bare_names(package, of_functions=True).items():
        assert len(places) <= LEFT_FUNCTIONS.get(room, 0), "\n".join(places)


def test_a_class_has_its_name_alone_in_both_packages() -> None:
    assert class_names_used_twice() == set()


def raw_collections(tree: ast.Module) -> Iterator[int]:
    """The lines where an f-string shows a list, a tuple, a set or a dict as Python does."""
    displays = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp)
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue):
            value = node.value
            makes_one = isinstance(value, ast.Call) and ast.unparse(value.func) in COLLECTIONS
            is_shape = isinstance(value, ast.Attribute) and value.attr == "shape"
            if isinstance(value, displays) or makes_one or is_shape:
                yield node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_messages_show_no_raw_list_or_tuple(package: str) -> None:
    """``converters.words`` has what joins them."""
    places = Counter(
        path.as_posix() for path, tree in modules(package) for _ in raw_collections(tree)
    )
    assert places == {path: RAW[path] for path in RAW if path.startswith(package)}


def test_the_lists_of_what_is_left_name_rooms_that_exist() -> None:
    assert all((ROOT / room).is_dir() for room in (*LEFT, *LEFT_FUNCTIONS))


if __name__ == "__main__":
    for of_functions in (False, True):
        print("# functions" if of_functions else "# variables, arguments and attributes")
        for package in PACKAGES:
            for room, places in sorted(bare_names(package, of_functions).items()):
                print(f'    "{room}": {len(places)},')
                print(*(f"        # {place}" for place in places), sep="\n")

    print(f"    # classes: {sorted(class_names_used_twice())}")
