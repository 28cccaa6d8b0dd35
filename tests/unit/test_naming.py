"""Names say what things are: no bare participle or adverb, also of a function, no class name twice.

python tests/unit/test_naming.py       prints what is left, in the form of the tables below
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
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
# what an annotation begins with that says the same
COLLECTION_TYPES = (
    *("dict", "frozenset", "list", "set", "tuple"),
    *("Collection", "Iterable", "Mapping", "Sequence", "Shape", "torch.Size"),
)
DISPLAYS = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp)
# How many f-strings that are no messages have a list or a tuple, by module.
RAW = {
    "ckpt/engine/parameters.py": 1,  # a line of a manifest
    "converters/computing/computed.py": 2,  # what is hashed
    "ckpt/saving/preemption.py": 2,  # a string in the place of a tuple
    "converters/quantized/recipe_finder.py": 3,  # a recipe, which is hashed
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


def is_collection(value: ast.expr) -> bool:
    """Whether an expression makes a list, a tuple, a set or a dict."""
    makes_one = isinstance(value, ast.Call) and ast.unparse(value.func) in COLLECTIONS
    return isinstance(value, DISPLAYS) or makes_one


def is_collection_type(annotation: ast.expr | None) -> bool:
    """Whether an annotation is that of a list, a tuple, a set or a dict, or of one or ``None``."""
    text = ast.unparse(annotation).removesuffix(" | None") if annotation is not None else ""
    return text.partition("[")[0] in COLLECTION_TYPES and " | " not in text.rpartition("]")[2]


@cache
def collection_attributes() -> frozenset[str]:
    """The fields and properties of classes that are collections wherever they have the name."""
    are_collections: dict[str, set[bool]] = defaultdict(set)
    for package in PACKAGES:
        for _, tree in modules(package):
            for node in ast.walk(tree):
                for member in node.body if isinstance(node, ast.ClassDef) else ():
                    if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                        is_one = is_collection_type(member.annotation)
                        are_collections[member.target.id].add(is_one)
                    elif isinstance(member, ast.FunctionDef) and member.decorator_list:
                        are_collections[member.name].add(is_collection_type(member.returns))
    return frozenset(name for name, kinds in are_collections.items() if kinds == {True})


def collection_names(function: ast.FunctionDef) -> set[str]:
    """The names in a function that are collections wherever it binds them."""
    are_collections: dict[str, set[bool]] = defaultdict(set)
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            are_collections[node.arg].add(is_collection_type(node.annotation))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            are_collections[node.target.id].add(is_collection_type(node.annotation))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            are_collections[node.targets[0].id].add(is_collection(node.value))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            are_collections[node.id]  # of a loop or an unpacking: nothing is known
    return {name for name, kinds in are_collections.items() if kinds == {True}}


def raw_collections(tree: ast.Module) -> Iterator[int]:
    """The lines where an f-string shows a list, a tuple, a set or a dict as Python does.

    By what it is made of in place, by the annotation of a field, and by what a function binds.
    """
    fields = collection_attributes() | {"shape"}
    lines: dict[ast.expr, int] = {}
    for node in ast.walk(tree):
        names = collection_names(node) if isinstance(node, ast.FunctionDef) else set()
        for shown in ast.walk(node) if names else (node,):
            if not isinstance(shown, ast.FormattedValue):
                continue
            value = shown.value
            is_field = isinstance(value, ast.Attribute) and value.attr in fields
            is_bound = isinstance(value, ast.Name) and value.id in names
            if is_collection(value) or is_field or is_bound:
                lines[value] = shown.lineno
    yield from lines.values()


@pytest.mark.parametrize("package", PACKAGES)
def test_messages_show_no_raw_list_or_tuple(package: str) -> None:
    """``converters.words`` has what joins them."""
    places = Counter(
        path.as_posix() for path, tree in modules(package) for _ in raw_collections(tree)
    )
    assert places == {path: RAW[path] for path in RAW if path.startswith(package)}


def test_a_list_or_a_tuple_is_seen_by_its_annotation_and_by_what_it_is_made_of() -> None:
    source = """
def message(sizes: tuple[int, ...], noun: str, every: int | Mapping[str, int], ref, entries):
    names = sorted(sizes)
    text = [noun]
    text = ", ".join(text)
    for name in names:
        yield f"{names} and {name}"
    yield f"{sizes}" f"{noun} {every} {text}"
    yield f"{', '.join(names)} {len(sizes)} {ref.shape}"
    yield f"{ref.expert_sizes}, {ref.world_size} {list(entries)}"
"""
    assert sorted(raw_collections(ast.parse(source))) == [7, 8, 9, 10, 10]


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
