"""The rules of the house: floors, cheap imports, a README that tells the truth."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from readme_parts import ROOT, filled

FLOORS: dict[str, int] = {
    **dict.fromkeys(("errors", "rows", "architectures", "boxes", "crops", "masks", "metrics", "storage"), 0),
    **dict.fromkeys(("encryption", "quality", "postprocess", "polygons", "pretrained"), 0),
    **dict.fromkeys(("resizing", "resizing_compiled"), 0),
    "spec": 1,
    "data": 2,
    "model": 2,
    "run": 2,
    "pasting": 2,
    "predictor": 3,
    "pictures": 3,
    "labelling": 4,
    **dict.fromkeys(("training", "inference", "evaluation"), 5),
    **dict.fromkeys(("cli", "demo", "client", "tools"), 6),
}
BELOW_TORCH, BELOW_RAY = 2, 4
RAY_MAY = {"run"}
"""Packages below the labelling line that may name ray: the connection to it."""


def _modules() -> list[Path]:
    return sorted((ROOT / "mal").rglob("*.py"))


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "mal" else {node.module}
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_floors_below_or_from_its_own_package(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    own = _part(module)
    if own in ("", "__init__"):
        return
    assert own in FLOORS, f"{own} has no floor: say which in FLOORS and in the README"
    for imported in _imports(path):
        if imported.startswith("mal."):
            other = _part(imported)
            if other in ("", "__version__") or other == own:
                continue
            same_floor = FLOORS[other] == FLOORS[own] == 0 or FLOORS[own] == 6
            assert FLOORS[other] < FLOORS[own] or same_floor, f"{module} imports {imported}"
        package = imported.partition(".")[0]
        assert package not in ("torch", "torchvision", "timm") or FLOORS[own] >= BELOW_TORCH, f"{module}: {imported}"
        assert package != "ray" or FLOORS[own] >= BELOW_RAY or own in RAY_MAY, f"{module}: {imported}"


@pytest.mark.parametrize("module", ["mal", "mal.cli"])
def test_importing_is_cheap(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'timm', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_tree_and_the_spec_table_of_the_readme_are_true():
    readme = (ROOT / "README.md").read_text()
    assert readme == filled(readme), "run: python tests/readme_parts.py"


def test_every_module_says_what_it_is_for():
    silent = [str(p.relative_to(ROOT)) for p in _modules() if not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []


def test_no_function_and_no_module_has_grown_too_long():
    long = []
    for path in _modules():
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        long += [f"{path.name}: {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60]
    assert long == []


def test_the_lock_names_exact_versions_and_no_index():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert all(line.count("==") == 1 and "://" not in line and "@" not in line for line in lines)
