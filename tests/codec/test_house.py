"""The exact path stays free of what other machines may compute otherwise, and the rooms import only what they may."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INEXACT = {"exp", "exp2", "pow", "sigmoid", "softmax", "softplus", "tanh", "erf", "erfc", "gelu", "silu",
           "layer_norm",
           "log", "log2", "sin", "cos", "div", "div_", "divide", "true_divide", "rsub", "reciprocal", "einsum",
           "linear", "autocast", "compile", "conv2d", "sqrt", "rsqrt"}  # fmt: skip


AT_EXPORT = {
    "exact.py": {"TrainableLayer", "backward", "bound"},
    "prior.py": {"PriorNet", "nearest", "_check", "carrier"},
}
"""What runs before a model ships, once and on one machine, or only counts."""


def exact_functions(path: Path, but: set[str]) -> list[ast.FunctionDef]:
    """All functions of a module, those of its classes too, but some and those of some classes."""
    parts = [
        node for node in ast.parse(path.read_text()).body if not (isinstance(node, ast.ClassDef) and node.name in but)
    ]
    found = [node for part in parts for node in ast.walk(part) if isinstance(node, ast.FunctionDef)]
    return [function for function in found if function.name not in but]


@pytest.mark.parametrize("file", AT_EXPORT)
def test_the_exact_path_uses_no_inexact_operation(file: str) -> None:
    found = exact_functions(ROOT / "service/codec" / file, AT_EXPORT[file])
    assert len(found) > 8
    for function in found:
        for node in ast.walk(function):
            assert not (isinstance(node, ast.Attribute) and node.attr in INEXACT), (function.name, node.attr)
            assert not (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div)), function.name
            assert not (isinstance(node, ast.Name) and node.id in INEXACT), (function.name, node.id)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_nothing_imports_what_lies_above_it() -> None:
    for path in sorted((ROOT / "service/codec").glob("*.py")):
        ours = {name for name in imports(path) if name.startswith(("service", "model_store"))}
        assert all(name.startswith("service.codec") for name in ours), path
    for path in sorted((ROOT / "model_store").rglob("*.py")):
        ours = {name for name in imports(path) if name.startswith("service")}
        assert all(name.startswith("service.codec") for name in ours), path
    assert not {
        name for name in imports(ROOT / "service/batching.py") if name.startswith(("service", "torch", "fastapi"))
    }
    ours = {name for name in imports(ROOT / "service/imaging.py") if name.startswith(("service", "torch", "fastapi"))}
    assert ours == {"service.structure"}  # the same room's look at a file before Pillow's, which knows nothing else
    assert imports(ROOT / "service/structure.py") <= {"__future__", "re", "struct"}
    for name, below in (("store", ("service.codec", "service.files")), ("engine", ("service.codec", "service.store"))):
        ours = {module for module in imports(ROOT / f"service/{name}.py") if module.startswith("service")}
        assert ours, name
        assert all(module.startswith(below) for module in ours), (name, ours)
