"""The mutants of a source text: small wrong changes that a test or a case should notice.

Arithmetic, comparisons, boolean operators, constants and slices are changed; statements and decorators are dropped.
Left alone is what no test should judge: docstrings, messages (what is raised, logged, warned of, printed or shortened,
f-strings, `__repr__`), type annotations and aliases, assertions, dataclass decorators, `__all__`.
"""

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

_ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_BOUNDARY: dict[type, type] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
_OPPOSITE: dict[type, type] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_WORD = re.compile(r"[\w.:/*-]+")
_MESSAGES = {"hint", "message", "help", "description", "reason"}
_LOGGING = {"warn", "print", "note", "timed", "shorten", "debug", "info", "warning", "error", "exception", "log"}
_DESCRIBING = {"__repr__", "__str__", "extra_repr", "__init_subclass__"}
_KEPT_DECORATORS = {"property", "staticmethod", "classmethod", "setter", "dataclass", "overload", "abstractmethod"}
_TYPES = {"tuple", "list", "dict", "set", "frozenset", "type", "cast", "TypeVar", "NewType"}


@dataclass(frozen=True)
class Mutant:
    """One change of one source file."""

    file: str
    """The file's path in the repository."""
    line: int
    """Where the change begins, from 1."""
    kind: str
    """Which operator made it."""
    text: str
    """The whole line, stripped: what the list of equivalents knows it by."""
    before: str
    """What stands there."""
    after: str
    """What is put there instead."""
    start: int
    """Offset of `before` in the file's bytes."""
    nth: int = 0
    """Which of the mutants with the same text, before and after this is, from 0."""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """The same for as long as the line stays as it is, wherever it moves."""
        return self.file, self.text, self.before, self.after, self.nth

    def apply(self, source: bytes) -> bytes:
        """The file with the change in it."""
        return source[: self.start] + self.after.encode() + source[self.start + len(self.before.encode()) :]


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a file, in the order of the text; each still compiles and differs from the others."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    found: dict[tuple[int, str, str], Mutant] = {}
    for mutant in finder.found:
        found.setdefault((mutant.start, mutant.before, mutant.after), mutant)
    return _numbered(mutant for mutant in found.values() if _compiles(mutant.apply(source)))


def _numbered(mutants: Iterator[Mutant]) -> list[Mutant]:
    counts: dict[tuple, int] = {}
    numbered = []
    for mutant in sorted(mutants, key=lambda mutant: (mutant.start, mutant.after)):
        nth = counts[mutant.key] = counts.get(mutant.key, -1) + 1
        numbered.append(Mutant(**{**vars(mutant), "nth": nth}))
    return numbered


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


class _Finder(ast.NodeVisitor):
    """Walks a module and notes each change; what is not visited is not changed."""

    def __init__(self, file: str, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._file, self._source = file, source
        self._lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    # --- noting -------------------------------------------------------------------------------------------------

    def _note(self, kind: str, node: ast.expr | ast.stmt, after: str) -> None:
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        before = self._source[start:end].decode()
        text = self._lines[node.lineno - 1].decode().strip()
        self.found.append(Mutant(self._file, node.lineno, kind, text, before, after, start))

    def _change(self, kind: str, node: ast.expr, **fields: object) -> None:
        """The expression with some of its fields changed, in parentheses so that it stays one expression."""
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        self._note(kind, node, f"({ast.unparse(other)})")

    def _drop(self, node: ast.stmt) -> None:
        self._note("drop", node, "pass")

    # --- expressions --------------------------------------------------------------------------------------------

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if _is_union(node):
            return
        other = _ARITHMETIC.get(type(node.op))
        if other:
            self._change("arithmetic", node, op=other())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._note("unary", node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._change("boolean", node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for position, op in enumerate(node.ops):
            for kind, table in (("boundary", _BOUNDARY), ("comparison", _OPPOSITE)):
                other = table.get(type(op))
                if other:
                    self._change(kind, node, ops=[*node.ops[:position], other(), *node.ops[position + 1 :]])
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._change("condition", node, body=node.orelse, orelse=node.body)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._note("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self._note("constant", node, f"({node.value + 1})")
        elif isinstance(node.value, float):
            self._note("constant", node, f"({node.value * 2 or 1.0!r})")
        elif isinstance(node.value, str) and _WORD.fullmatch(node.value):
            self._note("word", node, repr(f"{node.value}_"))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if _is_type(node.value):
            return
        if isinstance(node.slice, ast.Slice):
            for bound in ("lower", "upper", "step"):
                if getattr(node.slice, bound):
                    without = copy.copy(node.slice)
                    setattr(without, bound, None)
                    self._change("index", node, slice=without)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _name(node.func) in _LOGGING | _TYPES and _name(node.func) not in {"tuple", "list", "dict", "set"}:
            return
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in _MESSAGES:
                self.visit(keyword.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A text for people; and Python 3.11 does not say where in the line its parts stand."""

    # --- statements ---------------------------------------------------------------------------------------------

    def visit_Expr(self, node: ast.Expr) -> None:
        value = node.value
        is_text = isinstance(value, ast.Constant)
        if is_text or (isinstance(value, ast.Call) and _name(value.func) in _LOGGING):
            return
        self._drop(node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._drop(node)
        other = _ARITHMETIC.get(type(node.op))
        if other:
            changed = ast.AugAssign(node.target, other(), node.value)
            self._note("arithmetic", node, ast.unparse(changed))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Name) and (node.targets[0].id == "__all__" or _is_type(node.value)):
            return
        if isinstance(node.targets[0], ast.Subscript | ast.Attribute):
            self._drop(node)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._drop(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        self._drop(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._drop(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._drop(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """For the reader."""

    def visit_If(self, node: ast.If) -> None:
        if _name(node.test) == "TYPE_CHECKING":
            return
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):  # those are turned around by themselves
            self._note("condition", node.test, f"(not ({ast.unparse(node.test)}))")
        if isinstance(node.body[-1], ast.Return) and len(node.body) == 1 and not node.orelse:
            self._drop(node.body[0])
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Annotations are passed over; a decorator is dropped."""
        if node.name in _DESCRIBING:
            return
        for decorator in node.decorator_list:
            if _name(decorator) not in _KEPT_DECORATORS:
                self._note("drop", decorator, "(lambda function: function)")
                self.visit(decorator)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)


def _name(node: ast.expr) -> str:
    """The last word of what is named or called."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_type(node: ast.expr) -> bool:
    """Whether it names a type, or what makes one: `Float[Tensor, "O I"]`, `tuple[int, ...]`, `A | B`."""
    if isinstance(node, ast.Subscript):
        return _is_type(node.value)
    if isinstance(node, ast.BinOp):
        return _is_union(node)
    if isinstance(node, ast.Call):
        return _name(node) in {"TypeVar", "NewType"}
    name = _name(node)
    return name in _TYPES or (name[:1].isupper() and not name.isupper())


def _is_union(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return isinstance(node.op, ast.BitOr) and all(
        _is_type(side) or (isinstance(side, ast.Constant) and side.value is None) for side in sides
    )
