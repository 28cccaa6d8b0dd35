"""A bug of ours is never told as a damaged file: what the code may catch, by its syntax.

``docs/decisions`` says why: a reader turns only its own error class into ``CheckpointError``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT
from syntax_trees import nodes, tree

# Raised by any mistake: caught only where the table below says why, or to be raised again.
WIDE = {"Exception", "BaseException", "TypeError", "AttributeError", "LookupError", "NameError"}
# Raised by interpreting calls, such as int(text): caught around one statement only.
OF_A_CALL = {
    *("ValueError", "KeyError", "IndexError", "ArithmeticError", "OverflowError", "error"),
    *("ZeroDivisionError", "RecursionError", "RuntimeError", "MemoryError", "SyntaxError"),
    *("UnicodeDecodeError", "UnicodeEncodeError", "UnicodeError", "AssertionError"),
}
CLIENT = "the Hub's client: told apart by what they carry, all others are raised again"
REASONS = {
    "ckpt/cli/main.py main": "the last place where a bug can be called one",
    "ckpt/distributed/chunks.py send": "the other rank is told, and it is raised",
    "ckpt/distributed/chunks.py receive": "the other ranks are told, and it is raised",
    "ckpt/distributed/console.py emit": "how logging wants it of a handler",
    "ckpt/distributed/ranks.py step": "all ranks are told, and it is raised on each",
    "ckpt/distributed/ranks.py reporting": "all ranks are told, and it is raised on each",
    "ckpt/distributed/rank_0_store.py _stay_for_readers": "torch's store, as the processes end",
    "ckpt/engine/checkpoint_engine.py save": "DeepSpeed is in a barrier; raised afterwards",
    "ckpt/engine/checkpoint_engine.py later": "DeepSpeed is in a barrier; raised afterwards",
    "ckpt/engine/first_step.py _state_after_step": "the step of a class of the user's",
    "ckpt/engine/first_step.py _bitsandbytes_state": "a class of bitsandbytes",
    "ckpt/engine/progress.py metrics": "float() of what the user calls a metric",
    "ckpt/engine/settings.py _size": "a function of DeepSpeed that asserts",
    "ckpt/engine/settings.py _scheduler": "the state of a class of the user's",
    "ckpt/engine/settings.py _data": "the length and the sampler of the user's classes",
    "ckpt/hub/client/errors.py translate_errors": CLIENT,
    "ckpt/hub/client/retry.py retry": CLIENT,
    "ckpt/hub/client/xet.py stream": "hf_xet has no class of its own for most of them",
    "ckpt/hub/commit.py _commit": CLIENT,
    "ckpt/hub/push.py _retire": CLIENT,
    "ckpt/hub/upload.py _preupload": CLIENT,
    "ckpt/runs/lease/lease.py _renew": "logged: the other leases must not die of it",
    "ckpt/saving/at_exit.py _drain_savers": "logged, and the process ends with an error",
    "ckpt/saving/commit/commit.py finishing": "all ranks are told, and it is raised",
    "ckpt/saving/pending.py finish": "all ranks are told, and it is raised",
    "ckpt/saving/pending.py advance": "all ranks are told, and it is raised",
    "ckpt/saving/pending.py start": "all ranks are told, and it is raised with the commit",
    "ckpt/state/blocks.py ahead": "raised where the thread is waited for",
    "ckpt/state/plain_reading.py state": "what safetensors, numpy and torch raise of bad bytes",
    "ckpt/state/plain_reading.py _container": "only hash() tells whether a value can be a key",
    "ckpt/state/plain_reading.py _array": "numpy's parser of element types",
    "ckpt/state/rng.py _apply": "the setters of random, numpy and torch",
    "ckpt/trainers/hf/mixin.py _save": "the other ranks are in a barrier; raised afterwards",
    "converters/execute/prefetch.py work": "raised where the thread is waited for",
    "converters/execute/workers.py work": "raised where the thread is waited for",
    "converters/values/blocks.py work": "raised where the thread is waited for",
    "converters/pickles/machine.py check_hash_flood": "only hash() tells whether a tuple has one",
}


def names_of(node: ast.expr | None) -> Iterator[str]:
    """The last names of the classes that a handler catches; those of a constant tuple too."""
    if node is None:
        yield "BaseException"
    elif isinstance(node, ast.Tuple):
        for element in node.elts:
            yield from names_of(element)
    elif isinstance(node, ast.Starred):
        yield "Exception"
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Name):
        yield "Exception" if node.id.isupper() else node.id


def is_one_call(body: list[ast.stmt]) -> bool:
    """Whether a block is one simple statement."""
    simple = (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)
    return len(body) == 1 and isinstance(body[0], simple)


def raises_again(body: list[ast.stmt]) -> bool:
    """Whether a handler ends with the error that it caught."""
    last = body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def nets(tree: ast.AST) -> Iterator[tuple[set[str], list[ast.stmt], list[ast.stmt]]]:
    """What is caught, around which statements, and what is done then."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield set(names_of(handler.type)), node.body, handler.body
        elif isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and {*names_of(call.func)} == {"suppress"}:
                    caught = {name for arg in call.args for name in names_of(arg)}
                    yield caught, node.body, [ast.Pass()]


def problem(caught: set[str], body: list[ast.stmt], handler: list[ast.stmt]) -> str | None:
    """What is wrong with a catch; ``None`` if nothing is."""
    if caught & WIDE and not raises_again(handler):
        return f"catches {', '.join(sorted(caught & WIDE))}"
    if caught & OF_A_CALL and not is_one_call(body):
        return f"catches {', '.join(sorted(caught & OF_A_CALL))} of several statements"
    return None


def problems(path: Path) -> Iterator[tuple[str, str]]:
    """The place of each catch that is too wide, and what is wrong with it."""
    functions = [node for node in nodes(path) if isinstance(node, ast.FunctionDef)]
    classes = [node for node in nodes(path) if isinstance(node, ast.ClassDef)]
    methods = {id(member) for node in classes for member in node.body}
    inner = {id(child) for node in functions for child in ast.walk(node) if child is not node}
    for function in functions or [tree(path)]:
        if id(function) in inner and id(function) not in methods:
            continue
        place = f"{path.relative_to(ROOT).as_posix()} {getattr(function, 'name', '')}"
        for net in nets(function):
            if (wrong := problem(*net)) is not None:
                yield place, wrong


@cache
def all_problems() -> list[tuple[str, str]]:
    paths = [*(ROOT / "converters").rglob("*.py"), *(ROOT / "ckpt").rglob("*.py")]
    return [problem for path in sorted(paths) for problem in problems(path)]


def test_no_catch_is_wider_than_the_call_that_interprets() -> None:
    wide = [f"{place}: {reason}" for place, reason in all_problems() if place not in REASONS]
    assert wide == []


def test_every_reason_is_of_a_catch() -> None:
    assert REASONS.keys() - {place for place, _ in all_problems()} == set()


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("def f():\n try:\n  a()\n except Exception:\n  pass", 1),
        ("def f():\n try:\n  a()\n except:\n  pass", 1),
        ("def f():\n try:\n  a()\n except BaseException:\n  b()\n  raise", 0),
        ("def f():\n with suppress(TypeError):\n  a()", 1),
        ("def f():\n try:\n  a = int(b)\n except ValueError:\n  a = 0", 0),
        ("def f():\n try:\n  a()\n  b()\n except (OSError, ValueError):\n  pass", 1),
        ("def f():\n with suppress(re.error):\n  if a:\n   b()", 1),
        ("def f():\n try:\n  a()\n except (OSError, *DAMAGE):\n  pass", 1),
        ("def f():\n try:\n  a()\n  b()\n except (OSError, MalformedError):\n  pass", 0),
    ],
)
def test_the_rule_sees_what_it_is_to_refuse(code: str, count: int) -> None:
    wrong = [net for net in nets(ast.parse(code)) if problem(*net) is not None]
    assert len(wrong) == count
