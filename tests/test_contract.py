"""Every command-line option: its name, help, default and opposite, and that a test uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from export3d_cli.main import cli

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "export3d_cli"


def commands(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(command)
    for below in command.list_commands(context) if isinstance(command, click.Group) else ():
        part = command.get_command(context, below)  # type: ignore[union-attr]
        assert part is not None
        yield from commands(part, f"{name} {below}".strip())
    if name:
        yield name, command


OPTIONS = [
    (name, option) for name, command in commands(cli) for option in command.params if isinstance(option, click.Option)
]


def test_every_option_is_used_by_a_test() -> None:
    """By the command line, or through the field or argument that it fills."""
    texts = [path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")]
    text = "\n".join(texts)
    used = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?![\w-])", text)) | set(re.findall(r"\b([a-z_]+)=", text))
    used |= {"--take"}  # test_evaluate.py calls what it calls
    unused = {f"{name} {option.opts[-1]}" for name, option in OPTIONS if not used & {*option.opts, option.name}}
    assert not unused


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_options_are_kebab_case_with_a_help_a_default_and_an_opposite(name: str, option: click.Option) -> None:
    for word in (*option.opts, *option.secondary_opts):
        assert re.fullmatch(r"-[a-zV]|--[a-z]+(-[a-z]+)*", word), word
    record = option.get_help_record(click.Context(click.Command(name)))
    assert record is not None
    text = re.sub(r"\s*\[[^\]]*\]", "", record[1]).strip()
    assert len(text) >= 5, f"{name} {option.opts[-1]} has no help"
    if option.is_flag:
        assert option.secondary_opts, f"{name} {option.opts[-1]} cannot be undone"
    elif option.default is not None and not option.multiple and not callable(option.default):
        absent = type(option.default).__name__ in ("Sentinel", "_Sentinel")  # newer versions of Click: not given
        assert absent or "default" in record[1], f"{name} {option.opts[-1]} does not tell its default"
