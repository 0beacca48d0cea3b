"""Rules for the package's source that no linter checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "export3d_cli"
PICKLE_MODULES = {"pickle", "marshal", "shelve", "dill"}
RUNS_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "__import__", "pickle.loads"}


def find_nodes(folder: Path, *kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Yield `file:line` and every node of these kinds in a folder's modules."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node  # type: ignore[attr-defined]


def test_core_never_prints_or_reads_the_terminal() -> None:
    for where, node in find_nodes(PACKAGE / "core", ast.Call):
        assert isinstance(node, ast.Call)
        assert ast.unparse(node.func) not in {"print", "input"}, where


def test_imports_are_absolute_and_never_pickle() -> None:
    for where, node in find_nodes(PACKAGE, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where} imports relatively"
            modules = [node.module or ""]
        else:
            assert isinstance(node, ast.Import)
            modules = [alias.name for alias in node.names]
        assert not PICKLE_MODULES & {module.split(".")[0] for module in modules}, where


def test_calls_cannot_execute_untrusted_data() -> None:
    """No eval, shell or pickle; yaml.safe_load; torch.load with weights_only; no unchecked extraction."""
    for where, node in find_nodes(PACKAGE, ast.Call):
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func)
        keywords = {key.arg: ast.unparse(key.value) for key in node.keywords}
        assert keywords.get("shell", "False") == "False", where
        assert keywords.get("allow_pickle", "False") == "False", where
        if "(" in name:  # a method of a call's result
            continue
        assert name not in RUNS_TEXT, where
        assert not name.startswith(("os.spawn", "os.exec", "subprocess.getoutput", "subprocess.getstatusoutput")), where
        assert not name.endswith(("tempfile.mktemp", "extractall", "extract")), where
        if name == "torch.load":
            assert keywords["weights_only"] == "True", where
        if name.startswith("subprocess."):
            assert not isinstance(node.args[0], (ast.Constant, ast.JoinedStr)), where


def test_yaml_is_only_loaded_safely() -> None:
    for where, node in find_nodes(PACKAGE, ast.Attribute):
        assert isinstance(node, ast.Attribute)
        if ast.unparse(node.value) == "yaml":
            assert node.attr in {"safe_load", "safe_dump", "YAMLError"}, where


def test_every_public_name_resolves() -> None:
    from export3d_cli import core

    for name in core.__all__:
        assert getattr(core, name) is not None
    with pytest.raises(AttributeError):
        core.nothing  # noqa: B018
