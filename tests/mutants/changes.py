"""The small errors that are put into a file: other operators, bounds, constants, arguments, and statements left out.

Nothing is changed in annotations, texts, imports and class headers, nor whether a zip is strict.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip
PAIRS = (
    ("min", "max"), ("any", "all"), ("floor", "ceil"), ("clamp_min", "clamp_max"), ("sin", "cos"), ("zeros", "ones"),
    ("zeros_like", "ones_like"),
)  # fmt: skip
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
DROPPED = ("detach", "clone", "eval")
"""Methods without arguments that are left out: x.detach() → x."""
KEPT_DECORATORS = ("property", "dataclass", "contextmanager", "classmethod", "staticmethod", "abstractmethod", "cache")

Swap = tuple[Any, str, Any]
"""An object of the tree, its attribute, and the attribute's changed value."""


@dataclass(frozen=True)
class Mutant:
    """One change of a file. `key` names it without line numbers."""

    line: str
    """The source line it begins on, stripped."""
    change: str
    """Before → after, numbered if the same happens several times on such a line."""
    first: int
    last: int
    """The lines of the statement that it is in; of an if or a loop only its head."""
    inside: bool
    """Whether it lies in a function's body, which may be replaced after the file was imported."""
    swap: Swap

    @property
    def key(self) -> str:
        return f"{self.line} | {self.change}"


def mutants(source: str, names: tuple[str, ...] = ()) -> tuple[ast.Module, list[Mutant]]:
    """The parsed file and what may be changed in it; with `names` only in the functions and classes called so."""
    tree, found = ast.parse(source), list[Mutant]()
    lines, counts = source.splitlines(), Counter[tuple[str, str]]()
    for statement, inside in _statements(tree, names):
        for node in _expressions(statement):
            for swap in _swaps(node, statement):
                number = getattr(node, "lineno", statement.lineno)
                line, change = lines[number - 1].strip(), _told(node, swap)
                counts[line, change] += 1
                if counts[line, change] > 1:
                    change += f" #{counts[line, change]}"
                found.append(Mutant(line, change, statement.lineno, _last(statement), inside, swap))
    return tree, found


def changed(tree: ast.Module, mutant: Mutant, compiled: Callable[[ast.Module], Any]) -> Any:
    """What `compiled` makes of the tree with the change in it; afterwards the tree is as it was."""
    owner, attribute, value = mutant.swap
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        return compiled(ast.fix_missing_locations(tree))
    finally:
        setattr(owner, attribute, before)


def _statements(tree: ast.AST, names: tuple[str, ...], inside: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement, and whether it lies in a function's body."""
    for child in ast.iter_child_nodes(tree):
        named = getattr(child, "name", None) in names if names else True
        if isinstance(child, ast.stmt) and (not names or inside):
            yield child, inside
        if not isinstance(child, ast.expr):
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _statements(child, () if named else names, inside or (function and named))


def _last(statement: ast.stmt) -> int:
    body = getattr(statement, "body", None)
    return max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno


def _expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """The statement itself and the expressions of its own, without annotations and texts."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.ClassDef):
            continue
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns") or (field in ("target", "targets") and not _indexed(value)):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":
                continue
            if isinstance(node, ast.Call) and field == "args" and getattr(node.func, "id", "") in ("cast", "TypeVar"):
                value = value[1:]
            for child in value if isinstance(value, list) else [value]:
                skipped = isinstance(child, ast.JoinedStr | ast.stmt | ast.expr_context | ast.excepthandler)
                if isinstance(child, ast.AST) and not skipped:
                    waiting.append(child)


def _indexed(targets: Any) -> bool:
    """Whether a target is assigned to by index, which may be changed."""
    return any(isinstance(one, ast.Subscript) for one in (targets if isinstance(targets, list) else [targets]))


def _swaps(node: ast.AST, statement: ast.stmt) -> Iterator[Swap]:
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield node, "op", OPERATORS[type(op)]()
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                if type(op) in OPERATORS:
                    yield node, "ops", [*ops[:i], OPERATORS[type(op)](), *ops[i + 1 :]]
        case ast.Constant(value=bool(value)):
            yield node, "value", not value
        case ast.Constant(value=int(value)):
            yield node, "value", value + 1
            if value:
                yield node, "value", value - 1
        case ast.Constant(value=float(value)):
            yield node, "value", 2 * value or 1.0
        case ast.UnaryOp(op=ast.USub()):
            yield node, "op", ast.UAdd()
        case ast.Slice(lower=lower, upper=upper):
            for field, bound in (("lower", lower), ("upper", upper)):
                if bound is not None and not isinstance(bound, ast.Constant):
                    yield node, field, ast.BinOp(bound, ast.Add(), ast.Constant(1))
        case ast.Name(id=name) if name in NAMES:
            yield node, "id", NAMES[name]
        case ast.Attribute(attr=name) if name in NAMES:
            yield node, "attr", NAMES[name]
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield node, "value", ast.Constant(None)
        case ast.Break():
            yield from _instead(node, statement, ast.Continue())
        case ast.Continue():
            yield from _instead(node, statement, ast.Break())
    yield from _larger(node, statement)


def _larger(node: ast.AST, statement: ast.stmt) -> Iterator[Swap]:
    """Conditions negated, arguments exchanged, calls and decorators left out."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        test = node.test
        negated = test.operand if isinstance(test, ast.UnaryOp) else ast.UnaryOp(ast.Not(), test)
        yield node, "test", negated
    if isinstance(node, ast.comprehension) and node.ifs:
        yield node, "ifs", [ast.UnaryOp(ast.Not(), node.ifs[0]), *node.ifs[1:]]
    if isinstance(node, ast.Call):
        for i, (a, b) in enumerate(zip(node.args, node.args[1:], strict=False)):
            same = type(a) is type(b) and isinstance(a, ast.Name | ast.Attribute) and ast.dump(a) != ast.dump(b)
            if same and getattr(node.func, "id", "") not in ("min", "max"):
                yield node, "args", [*node.args[:i], b, a, *node.args[i + 2 :]]
        if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED and not node.args:
            yield node, "func", ast.Lambda(_no_arguments(), node.func.value)
    if isinstance(node, ast.FunctionDef) and node is statement:
        for one in node.decorator_list:
            if not any(name in ast.unparse(one) for name in KEPT_DECORATORS):
                yield node, "decorator_list", [other for other in node.decorator_list if other is not one]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "value", ast.Constant(None)


def _no_arguments() -> ast.arguments:
    return ast.arguments([], [], None, [], [], None, [])


def _instead(node: ast.AST, statement: ast.stmt, other: ast.stmt) -> Iterator[Swap]:
    yield node, "__class__", type(other)


def _told(node: ast.AST, swap: Swap) -> str:
    """Before → after, of the node alone or of an if's, loop's or function's head."""
    owner, attribute, value = swap
    before = getattr(owner, attribute)
    told = [_text(node)]
    setattr(owner, attribute, value)
    told.append(_text(node))
    setattr(owner, attribute, before)
    return " → ".join(told)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        return ast.unparse(node.test)
    if isinstance(node, ast.FunctionDef):
        return f"{' '.join(f'@{ast.unparse(one)}' for one in node.decorator_list)} def {node.name}"
    if isinstance(node, ast.Slice):
        return ast.unparse(ast.Subscript(ast.Name("x"), node))[1:]
    return ast.unparse(node)
