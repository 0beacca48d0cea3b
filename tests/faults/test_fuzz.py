"""The fuzzer with a small budget, and with a large one (slow; last result in README.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import fuzz, readers

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", list(readers()))
def test_readers_survive_100_mutations(name: str) -> None:
    _, crashes = fuzz(name, 100, seed=1)
    assert crashes == []


@pytest.mark.slow
def test_readers_survive_5000_mutations(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    args = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--executions", "5000", "--seed", "2", "--keep"]
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
