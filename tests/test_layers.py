"""Who may import whom; the picture is in the docstring of each layer's package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "export3d_cli"
CORE = "export3d_cli.core"


def imports(path):
    """Full names imported by a file, anywhere in it, except for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(part):
    path = PACKAGE / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []


def test_the_core_never_prints():
    for path in files("core"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "input", "eval", "exec"}, f"{path.name}:{node.lineno}"


def test_commands_use_the_public_door():
    for path in files("commands"):
        for name in imports(path):
            if name.startswith("export3d_cli"):
                assert name.split(".")[1] in {"core", "options", "console"}, f"{path.name} imports {name}"
                assert not name.startswith(CORE + "."), f"{path.name} goes past the door of the core: {name}"
            else:
                assert name.split(".")[0] not in {"torch", "numpy", "cv2"}, f"{path.name} imports {name}"


def test_no_pickle_and_no_shell():
    for path in files("."):
        for name in imports(path):
            assert name.split(".")[0] not in {"pickle", "marshal", "shelve", "dill"}, f"{path} imports {name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
                assert not (node.arg in {"shell", "allow_pickle"} and node.value.value is True), f"{path}:{node.lineno}"


def test_every_public_name_can_be_resolved():
    from export3d_cli import core

    for name in core.__all__:
        assert getattr(core, name) is not None
    with pytest.raises(AttributeError):
        core.nothing  # noqa: B018
