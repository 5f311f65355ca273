"""The layering of megapar: which package may import which, checked on the syntax tree, and the size limits."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megapar"
MAX_FILE, MAX_FUNCTION = 300, 60

# A package may import those on earlier lines, and on its own line those to its left.
ORDER = [
    ["shared_memory", "channels", "mesh", "params", "transport"],
    ["grads", "batch"],
    ["_C", "ops"],  # _C: the compiled kernels
    ["optim", "collectives", "failures"],
    ["layers"],
    ["recompute"],
    ["pipeline", "zero"],
    ["models", "objectives", "data"],
    ["training"],
    ["planning", "integrations", "doctor"],
    ["cli"],
    ["__main__"],
]
APART = {"pipeline", "zero"}  # these two do not import each other
PLACE = {name: (level, column) for level, names in enumerate(ORDER) for column, name in enumerate(names)}
# Kernels and data readers take what they need to know about the mesh as arguments.
NOT_DISTRIBUTED = {"ops", "data"}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that is imported anywhere in the tree, also under `if TYPE_CHECKING`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def order_problem(here: str, there: str) -> str | None:
    """Why the package `here` may not import the package `there`; None if it may."""
    if here == there or there == "__version__":
        return None
    if there in ("", "*"):
        return "imports megapar itself, which imports everything: name the package that is meant"
    if there not in PLACE:
        return f"imports megapar.{there}, which has no place in ORDER in tests/test_import_order.py: give it one"
    if {here, there} == APART:
        return f"imports megapar.{there}: neither of {here} and {there} may import the other"
    if PLACE[there] > PLACE[here]:
        return f"imports megapar.{there}, which comes later in the order"
    return None


def import_problems(path: Path, source: str) -> list[str]:
    """Sentences on the imports of one file; `path` is relative to the root."""
    parts = path.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    parts = parts[:-1] if is_package else parts
    if len(parts) == 1:  # megapar/__init__.py may import anything
        return []
    here = parts[1]
    if here not in PLACE:
        return [f"{path}: megapar.{here} has no place in ORDER in tests/test_import_order.py: give it one"]
    problems = []
    for line, name in imports(ast.parse(source), ".".join(parts), is_package):
        head, _, rest = name.partition(".")
        problem = order_problem(here, rest.partition(".")[0]) if head == "megapar" else None
        if here in NOT_DISTRIBUTED and (name + ".").startswith("torch.distributed."):
            problem = f"uses torch.distributed, which {here} may not"
        if problem:
            problems.append(f"{path}:{line}: {problem}")
    return list(dict.fromkeys(problems))


def size_problems(path: Path, source: str) -> list[str]:
    """Sentences on what is too long in one file."""
    lines = len(source.splitlines())
    problems = [f"{path}: {lines} lines, at most {MAX_FILE} are allowed"] if lines > MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                problems.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    return problems


def sources() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def test_packages_import_only_earlier_ones() -> None:
    problems = [problem for path, source in sources() for problem in import_problems(path, source)]
    assert not problems, "\n" + "\n".join(problems)


def test_files_and_functions_are_short() -> None:
    problems = [problem for path, source in sources() for problem in size_problems(path, source)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megapar/__init__.py", "from megapar.cli import main"),
        ("megapar/params.py", "from megapar import mesh\nfrom .mesh import Mesh"),
        ("megapar/layers/linear.py", "from . import norm\nfrom .. import ops\nfrom ..mesh import Mesh"),
        ("megapar/layers/__init__.py", "from .linear import Linear\nfrom megapar.layers.norm import Norm"),
        ("megapar/data/text.py", "from megapar.objectives import loss\nimport torch, numpy.distributed"),
        ("megapar/cli.py", "import torch.distributed\nfrom megapar import __version__"),
    ],
)
def test_allowed(path: str, source: str) -> None:
    assert import_problems(Path(path), source) == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("megapar/mesh.py", "from .params import p", "imports megapar.params, which comes later in the order"),
        ("megapar/mesh.py", "from megapar import params", "comes later"),
        ("megapar/ops/norm.py", "if TYPE_CHECKING:\n    from ..layers.linear import Linear", "comes later"),
        ("megapar/ops/norm.py", "def f():\n    import megapar.layers.linear as m", "comes later"),
        ("megapar/ops/norm.py", "importlib.import_module('megapar.cli')", "comes later"),
        ("megapar/zero/shard.py", "from megapar.pipeline import x", "neither of zero and pipeline"),
        ("megapar/pipeline/stage.py", "from ..zero.shard import x", "neither of pipeline and zero"),
        ("megapar/cli.py", "import megapar", "imports megapar itself"),
        ("megapar/cli.py", "from megapar import *", "imports megapar itself"),
        ("megapar/errors.py", "", "megapar.errors has no place in ORDER"),
        ("megapar/cli.py", "from .errors import E", "megapar.errors, which has no place in ORDER"),
        ("megapar/ops/norm.py", "import torch.distributed as dist", "uses torch.distributed, which ops may not"),
        ("megapar/ops/norm.py", "from torch.distributed.nn import x", "uses torch.distributed"),
        ("megapar/data/text.py", "from torch import distributed", "uses torch.distributed, which data may not"),
        ("megapar/data/text.py", "import torch\ntorch.distributed.get_rank()", "uses torch.distributed"),
    ],
)
def test_forbidden(path: str, source: str, problem: str) -> None:
    problems = import_problems(Path(path), source)
    assert len(problems) == 1
    assert problem in problems[0]


def test_size_limits() -> None:
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION
    assert size_problems(Path("f.py"), function) == ["f.py:1: f has 61 lines, at most 60"]
    assert size_problems(Path("f.py"), "\n" * 301) == ["f.py: 301 lines, at most 300 are allowed"]
    assert size_problems(Path("f.py"), "\n" * 300) == []
