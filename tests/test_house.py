"""The house keeps its walls: which room may import which, and what a start-up may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opdsl"

GROUND = {"source", "diagnostics", "codes", "resources", "records", "render", "wrapping"}
ROOMS = {  # room -> rooms it may import at module level or inside functions
    **{name: GROUND for name in GROUND},
    "syntax": GROUND,
    "meaning": GROUND | {"syntax"},
    "ir": GROUND | {"meaning", "emit"},
    "passport": GROUND | {"meaning", "ir", "emit"},
    "formula": GROUND | {"meaning", "ir", "passport", "compilation", "syntax"},
    "emit": GROUND | {"meaning", "ir", "formula", "compilation"},
    "train": GROUND | {"meaning", "ir", "emit", "passport", "syntax", "method"},
    "serve": GROUND | {"train"},
}
FREE = {"cli", "compilation", "method", "__init__", "__main__"}
TORCH_ROOMS = {"emit", "train", "serve", "cli"}
TORCH_FILES = {
    "ir/interpret.py",
    "passport/enumerate.py",
    "passport/measure.py",
    "passport/model.py",
    "passport/small.py",
    *(f"passport/diff_{part}.py" for part in ("batches", "measure", "witness")),
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at module level) of every import statement."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in tree.body:  # `if TYPE_CHECKING:` imports run for no one
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    inner.skip = True  # type: ignore[attr-defined]
    out = []
    for node in ast.walk(tree):
        if getattr(node, "skip", False):
            continue
        if isinstance(node, ast.Import):
            out += [(a.name, node in top) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.append((node.module, node in top))
    return out


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms(path):
    here = room(path)
    if here in FREE:
        return
    allowed = ROOMS[here] | {here}
    for module, _ in imports(path):
        if module.startswith("opdsl."):
            there = module.split(".")[1]
            assert there in allowed, f"{here} may not import {there} ({module})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_stays_in_its_rooms(path):
    name = path.relative_to(PACKAGE).as_posix()
    for module, top in imports(path):
        root = module.split(".")[0]
        if root in ("torch", "transformers", "accelerate", "peft"):
            assert room(path) in TORCH_ROOMS or name in TORCH_FILES, f"{name} imports {root}"
            assert not (room(path) == "cli" and top), f"{name} loads {root} at start-up"
        if root == "sympy":
            assert room(path) == "formula" and not top, f"{name} imports sympy"
        assert root not in ("pickle", "marshal", "shelve"), name


def test_nothing_evaluates_text():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("eval", "exec"):
                    assert path.name == "runtime.py", f"{path.name} calls {node.func.id}"
                assert node.func.id != "sympify", path.name


@pytest.mark.parametrize("command", [["check", "-q", "cr_opd"], ["fmt", "--check", "cr_opd"]])
def test_start_up_is_light(command):
    code = (
        "import sys\nfrom opdsl.cli import cli\n"
        f"cli.main({command!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'sympy', 'pygls', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
