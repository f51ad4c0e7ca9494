"""From `--impl NAME` or `--impl module:Class` to an implementation."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

from parity.bugs.known import BUGS
from parity.errors import UnknownImplementation
from parity.implementations.protocol import Implementation

TORCH_IMPLEMENTATIONS = {
    "torch_impl": "parity.implementations.torch_dora:TorchDora",
    "peft": "parity.implementations.peft_witness:PeftWitness",
}
"""Run inside a torch rank."""

JAX_IMPLEMENTATIONS = {
    "jax": "parity.implementations.jax_sharded:JaxSharded",
    "jax-mesh": "parity.implementations.jax_mesh:JaxMesh",
    "jax-files": "parity.implementations.jax_files:JaxFiles",
    "closed-form": "parity.implementations.jax_algebra:ClosedForm",
    "differences": "parity.implementations.jax_algebra:Differences",
}
"""Run inside the JAX process."""

FILES = "jax-files"
"""The other side of every exchange of files."""
MUTANT = "mutant"
"""`mutant:NAME` is an implementation with that bug planted, and runs where that one runs."""

_TORCH_MUTANTS, _JAX_MUTANTS = "parity.implementations.mutants", "parity.implementations.jax_mutants"
_BUILT_IN = {**TORCH_IMPLEMENTATIONS, **JAX_IMPLEMENTATIONS}


def runs_in_jax(name: str) -> bool:
    """Whether the JAX process runs an implementation, and no torch rank."""
    module, _, bug = name.partition(":")
    planted = module == MUTANT and bug in BUGS
    return (BUGS[bug].subject if planted else name) in JAX_IMPLEMENTATIONS


def check_exists(name: str) -> None:
    """Refuse a name that cannot be an implementation, without importing a framework.

    Raises:
        UnknownImplementation: no such built-in, or no such module.
    """
    if name in _BUILT_IN:
        return
    module, _, class_name = name.partition(":")
    if module == MUTANT and class_name in BUGS:
        return
    if not class_name:
        known = ", ".join(TORCH_IMPLEMENTATIONS)
        raise UnknownImplementation(f"--impl {name!r} is unknown", hint=f"one of {known}, or module:Class")
    _put_here_on_path()
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # noqa: BLE001 - a package on the way may raise whatever it likes
        spec = None
    if spec is None:
        raise UnknownImplementation(f"--impl {name!r}: no module {module!r}", hint="run where it can be imported")
    if not _may_have(spec.origin, class_name):
        raise UnknownImplementation(f"--impl {name!r}: {module} has no {class_name!r}", hint="as in module:Class")


def _may_have(origin: str | None, class_name: str) -> bool:
    """Whether a module's source gives something that name; it is read, not run. What cannot be told is believed."""
    if not origin or not origin.endswith(".py"):
        return True
    try:
        nodes = list(ast.walk(ast.parse(Path(origin).read_text(encoding="utf-8"))))
    except (OSError, SyntaxError, ValueError):
        return False
    given = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    given |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    given |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    return bool(given & {class_name, "*", "__getattr__"})


def resolve(name: str) -> Implementation:
    """Import and construct an implementation.

    Raises:
        UnknownImplementation: the module has no such class, or is none of ours.
    """
    module, _, class_name = _BUILT_IN.get(name, name).partition(":")
    if module == MUTANT:
        module = _JAX_MUTANTS if runs_in_jax(name) else _TORCH_MUTANTS
    _put_here_on_path()
    try:
        return _find(module, class_name)()
    except (ImportError, AttributeError) as error:
        raise UnknownImplementation(
            f"--impl {name!r}: {error}", hint="module:Class, with no constructor arguments"
        ) from error


def _put_here_on_path() -> None:
    """A third party's module lies where the command is run; a console script does not look there."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _find(module: str, class_name: str) -> type[Implementation]:
    found = importlib.import_module(module)
    return found.MUTANTS[class_name] if module in {_JAX_MUTANTS, _TORCH_MUTANTS} else getattr(found, class_name)
