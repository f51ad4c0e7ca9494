"""Who may load a framework: oracle, ranks, implementations and what measures them; nobody else, in no function."""

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOM = Path(str(files("parity")))
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "optax", "bitsandbytes", "transformers", "peft", "ref", "torch_impl"}
"""The frameworks, and the rooms that load them."""
MAY_LOAD = ("oracle/", "implementations/", "workers/torch_ranks.py", "workers/jax_process.py", "bench/", "gpu/")
CORE = sorted(
    str(path.relative_to(ROOM)) for path in ROOM.rglob("*.py") if not str(path.relative_to(ROOM)).startswith(MAY_LOAD)
)
WITHOUT_FRAMEWORK = ("implementations/registry.py", "implementations/protocol.py", "oracle/prediction.py")
"""Files of those folders that the core reads itself."""
JAX_ONLY = (
    "oracle",
    "workers/jax_process.py",
    "implementations/jax_algebra.py",
    "implementations/jax_files.py",
    "implementations/jax_mesh.py",
    "implementations/jax_mutants.py",
    "implementations/jax_sharded.py",
)


def imported(path):
    """The top names of every import in a file, wherever it stands; `import_module` with a literal is one too."""
    for node in ast.walk(ast.parse((ROOM / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize("path", [*CORE, *WITHOUT_FRAMEWORK])
def test_the_core_imports_no_framework(path):
    """No file of the core imports torch, jax, or a room that loads one of them, at its top or in a function."""
    assert set(imported(path)) & FRAMEWORKS == set()


RANK_SIDE = sorted(
    str(path.relative_to(ROOM))
    for path in [*ROOM.glob("implementations/**/*.py"), ROOM / "workers/torch_ranks.py"]
    if str(path.relative_to(ROOM)) not in JAX_ONLY
)


@pytest.mark.parametrize("path", RANK_SIDE)
def test_what_a_torch_rank_runs_imports_no_jax(path):
    """No implementation for torch ranks imports jax or the reference: it cannot see the answer."""
    assert set(imported(path)) & {"jax", "jaxlib", "flax", "optax", "ref"} == set()


ORACLE_SIDE = sorted(
    str(path.relative_to(ROOM)) for path in ROOM.rglob("*.py") if str(path.relative_to(ROOM)).startswith(JAX_ONLY)
)


@pytest.mark.parametrize("path", ORACLE_SIDE)
def test_the_oracle_imports_no_torch(path):
    """The oracle shares no code with what it judges."""
    assert set(imported(path)) & {"torch", "torch_impl", "bitsandbytes", "peft", "transformers"} == set()


def test_the_pipeline_loads_no_framework():
    """Importing all that the parent process runs loads neither torch nor jax, by whatever way."""
    code = "import sys, parity.commands.run, parity.commands.mutants, parity.report.case_view; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - ours

    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "parity" in loaded
    assert loaded & FRAMEWORKS == set()
