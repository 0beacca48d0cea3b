"""Shell completion for bash, zsh and fish, invoked as each shell does, and in a real bash if available."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from export3d_cli import examples
from export3d_cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [("bash", "complete -o"), ("zsh", "#compdef export3d"), ("fish", "complete ")]


def complete(shell: str, words: str, incomplete: str) -> list[str]:
    """Return the completions when Tab is pressed after `words incomplete`."""
    line = f"export3d {words} {incomplete}" if words else f"export3d {incomplete}"
    env = {"_EXPORT3D_COMPLETE": f"{shell}_complete", "COMP_WORDS": line}
    env["COMP_CWORD"] = incomplete if shell == "fish" else str(len(words.split()) + 1)
    result = CliRunner().invoke(cli, [], prog_name="export3d", env=env)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_commands_options_and_choices(shell: str) -> None:
    commands = complete(shell, "", "")
    for name in examples.COMMANDS:
        assert any(name in line for line in commands), name
    assert any("--yaw" in line for line in complete(shell, "novel-view", "--y"))
    assert not any("--pitch" in line for line in complete(shell, "novel-view", "--y"))
    assert any("bf16" in line for line in complete(shell, "reenact --precision", "b"))
    assert any("download" in line for line in complete(shell, "weights", "d"))


@pytest.mark.parametrize(("shell", "marker"), SCRIPTS)
def test_completion_script_matches_the_shell(shell: str, marker: str) -> None:
    if shell == "bash" and not shutil.which("bash"):
        pytest.skip("no bash")
    result = CliRunner().invoke(cli, [], prog_name="export3d", env={"_EXPORT3D_COMPLETE": f"{shell}_source"})
    assert result.exit_code == 0
    assert marker in result.stdout
    assert f"_EXPORT3D_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_completion_works_in_a_real_bash(tmp_path: Path) -> None:
    program = tmp_path / "export3d"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from export3d_cli.main import main; main()" "$@"\n')
    program.chmod(0o755)
    typed = 'eval "$(_EXPORT3D_COMPLETE=bash_source export3d)"; COMP_WORDS=(export3d edit-); COMP_CWORD=1; '
    typed += '_export3d_completion export3d; echo "${COMPREPLY[@]}"; complete -p export3d'
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines()[0] == "edit-basis"
    assert "_export3d_completion" in done.stdout
