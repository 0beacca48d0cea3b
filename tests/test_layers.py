"""Who may import whom; the picture is in the docstring of each layer's package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "export3d_cli"
CORE = "export3d_cli.core"
PLAIN = ("errors", "config", "camera", "files", "plain")  # what everything in the core may use

# part of the package -> parts of the core it may import (besides itself and PLAIN)
CORE_RULES = {
    "errors.py": (),
    "files.py": (),
    "plain.py": (),
    "config.py": ("config_rules",),
    "config_rules.py": (),
    "camera.py": (),
    "hub.py": (),
    "weights.py": ("hub",),
    "checkpoint.py": (),
    "device.py": (),
    "metrics.py": ("face",),
    "media": (),
    "face": ("media",),
    "model": (),
    "train": ("model", "media", "face", "checkpoint", "device", "hub", "plot", "weights"),
    "tracking.py": ("device", "face", "weights"),
    "driver.py": ("face", "media", "weights"),
    "control.py": (),
    "interrupt.py": (),
    "pipeline.py": (),
    "batch.py": ("animate", "compose", "face", "media", "driver"),
    "watermark.py": ("media",),
    "compose.py": ("face", "media", "weights"),
    "frames.py": ("job", "media", "model"),
    "keys.py": (),
    "job.py": ("control", "driver", "face", "tracking", "watermark"),
    "portrait.py": ("face", "frames", "job"),
    "animate.py": (
        "compose",
        "job",
        "control",
        "device",
        "driver",
        "frames",
        "keys",
        "model",
        "face",
        "media",
        "checkpoint",
        "pipeline",
        "portrait",
        "tracking",
        "watermark",
        "weights",
    ),
    "mesh_export.py": ("animate", "face", "media", "weights"),
    "views.py": ("animate", "compose", "driver", "job", "mesh_export", "media", "pipeline", "watermark"),
    "basis.py": ("animate", "face"),
    "machine.py": ("device",),
    "plot.py": (),
    "curves.py": ("animate", "batch", "driver", "machine", "model", "plot", "face", "media", "weights"),
    "bench.py": ("animate", "driver", "machine", "face", "media", "weights"),
    "doctor.py": ("face", "media", "weights"),
    "clips.py": ("face", "media"),
    "lists.py": (),
    "sheet.py": ("clips", "face", "media"),
    "capture.py": ("driver", "face", "media", "tracking", "weights"),
    "preprocess.py": ("capture", "clips", "interrupt", "lists", "sheet", "face", "media", "tracking"),
    "identity.py": ("metrics", "face", "media"),
    "scoring.py": ("metrics", "identity", "face"),
    "cases.py": ("scoring", "face", "media"),
    "report.py": ("metrics", "media"),
    "evaluate.py": (
        "animate",
        "cases",
        "identity",
        "metrics",
        "model",
        "report",
        "scoring",
        "train",
        "views",
        "face",
        "media",
    ),
}
FORBIDDEN = {  # part -> packages from outside it must not import, not even in a function
    "errors.py": {"click", "torch", "numpy"},
    "config.py": {"torch", "cv2"},
    "config_rules.py": {"torch", "cv2"},
    "camera.py": {"torch"},
    "hub.py": {"torch"},
    "watermark.py": {"torch"},
    "weights.py": {"torch"},
    "face": {"torch"},
    "tracking.py": {"torch"},
    "driver.py": {"torch"},
    "compose.py": {"torch"},
    "clips.py": {"torch"},
    "sheet.py": {"torch"},
    "preprocess.py": {"torch"},
    "capture.py": {"torch"},
    "metrics.py": {"torch"},
    "cases.py": {"torch"},
    "report.py": {"torch"},
    "plot.py": {"torch"},
}


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


def test_every_part_of_the_core_has_a_rule():
    parts = {p.name for p in (PACKAGE / "core").iterdir() if p.name not in {"__init__.py", "__pycache__"}}
    assert parts <= set(CORE_RULES)


@pytest.mark.parametrize("part", CORE_RULES)
def test_core_imports_only_what_lies_below(part):
    own = part.removesuffix(".py")
    allowed = {own, *PLAIN, *CORE_RULES[part]}
    for path in files(f"core/{part}"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in {"click", "rich"}, f"{path.name}: the core knows no command line, but imports {name}"
            assert top not in FORBIDDEN.get(part, set()), f"{path.name} imports {name}"
            if name.startswith("export3d_cli") and name != "export3d_cli.__version__":
                assert name.startswith(CORE), f"{path.name} imports {name}"
                assert name.removeprefix(CORE + ".").split(".")[0] in allowed, f"{path.name} imports {name}"


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


def test_files_stay_short():
    for path in files("core"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
    for path in files("commands"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 120, path.name


def test_every_public_name_can_be_resolved():
    from export3d_cli import core

    for name in core.__all__:
        assert getattr(core, name) is not None
    with pytest.raises(AttributeError):
        core.nothing  # noqa: B018
