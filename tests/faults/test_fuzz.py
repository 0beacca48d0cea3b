"""The fuzzer with a small budget; the slow one has a large budget, its last result stands in README.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import fuzz, readers

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", list(readers()))
def test_a_little(name: str) -> None:
    _, crashes = fuzz(name, 100, seed=1)
    assert crashes == []


@pytest.mark.slow
def test_a_lot(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    args = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--executions", "5000", "--seed", "2", "--keep"]
    done = subprocess.run(args, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
