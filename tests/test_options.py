"""Option values are parsed exactly or refused; every option has a help text, a default, a negation and a test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from export3d_cli import options
from export3d_cli.main import cli

TESTS = Path(__file__).resolve().parent
RATE, RANGE = options.FrameRate(), options.NumberRange()
FINITE = st.floats(-999_999, 999_999)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_fractional_rate_is_exact(numerator: int, denominator: int) -> None:
    assume(numerator <= 1000 * denominator)
    assert RATE.convert(f"{numerator}/{denominator}", None, None) == Fraction(numerator, denominator)


@settings(deadline=None)
@given(st.integers(1, 1000), st.sampled_from(["", ".0", ".00"]))
def test_integer_rate_is_exact(rate: int, suffix: str) -> None:
    assert RATE.convert(f"{rate}{suffix}", None, None) == rate


@settings(deadline=None)
@given(st.sampled_from([24, 30, 48, 60, 120, 240]), st.integers(2, 6))
def test_rounded_ntsc_rate_becomes_exact(rate: int, digits: int) -> None:
    exact = Fraction(rate * 1000, 1001)
    assert RATE.convert(f"{float(exact):.{digits}f}", None, None) == exact


@settings(deadline=None)
@given(st.decimals(Fraction(1, 1000), 1000, places=3))
def test_decimal_rate_is_exact_or_the_nearest_ntsc_rate(rate: Fraction) -> None:
    result = RATE.convert(str(rate), None, None)
    assert result == Fraction(rate) or (
        result.denominator in {7, 11, 13, 77, 91, 143, 1001} and abs(result / Fraction(rate) - 1) < 3e-4
    )


@settings(deadline=None)
@given(st.text())
def test_any_text_is_refused_or_in_range(text: str) -> None:
    for kind in (RATE, RANGE):
        try:
            result = kind.convert(text, None, None)
        except click.BadParameter:
            continue
        assert 0 < result <= 1000 if kind is RATE else all(abs(end) < 1e6 for end in result)


@pytest.mark.parametrize("text", ["0", "-25", "1/0", "1e400000000", "nan", "inf", "1001", "25/1/1", "٢٥", ""])
def test_invalid_rates_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="frame rate"):
        RATE.convert(text, None, None)


@settings(deadline=None)
@given(FINITE, FINITE)
def test_range_is_one_or_two_numbers(first: float, last: float) -> None:
    assert RANGE.convert(f"{first}:{last}", None, None) == (first, last)
    assert RANGE.convert(str(first), None, None) == (first, first)


@pytest.mark.parametrize("text", [":", "1:", ":2", "1:2:3", "a", "nan", "0:inf", "1e6:0", ""])
def test_invalid_ranges_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="A:B"):
        RANGE.convert(text, None, None)


def list_options(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Option]]:
    """Yield every option of a command and its subcommands with the command's full name."""
    context = click.Context(command)
    for subname in command.list_commands(context) if isinstance(command, click.Group) else ():
        subcommand = command.get_command(context, subname)  # type: ignore[union-attr]
        assert subcommand is not None
        yield from list_options(subcommand, f"{name} {subname}".strip())
    if name:
        yield from ((name, option) for option in command.params if isinstance(option, click.Option))


OPTIONS = list(list_options(cli))


def test_every_option_is_used_by_a_test() -> None:
    """On the command line, or as the keyword argument it fills."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    used = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?![\w-])", text)) | set(re.findall(r"\b([a-z_]+)=", text))
    used |= {"--take"}  # test_evaluate.py calls the function behind it
    unused = {f"{name} {option.opts[-1]}" for name, option in OPTIONS if not used & {*option.opts, option.name}}
    assert not unused


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_options_have_kebab_case_help_default_and_negation(name: str, option: click.Option) -> None:
    for flag in (*option.opts, *option.secondary_opts):
        assert re.fullmatch(r"-[a-zV]|--[a-z]+(-[a-z]+)*", flag), flag
    record = option.get_help_record(click.Context(click.Command(name)))
    assert record is not None
    text = re.sub(r"\s*\[[^\]]*\]", "", record[1]).strip()
    assert len(text) >= 5, f"{name} {option.opts[-1]} has no help"
    if option.is_flag:
        assert option.secondary_opts, f"{name} {option.opts[-1]} cannot be undone"
    elif option.default is not None and not option.multiple and not callable(option.default):
        unset = type(option.default).__name__ in ("Sentinel", "_Sentinel")  # newer versions of Click
        assert unset or "default" in record[1], f"{name} {option.opts[-1]} does not show its default"


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("novel-view --mesh head.glb --yaw 0:20 --frames 3", "--yaw, --frames has no effect with a mesh alone"),
        ("novel-view --grid --loop once --fps 30", "--loop, --fps has no effect with --grid"),
        (f"personalize {__file__} {__file__} -o x.person.safetensors --frames 2", "--frames has no effect with photos"),
        ("edit-basis --grid --frames 9", "--frames has no effect with --grid"),
        (
            f"reenact {__file__} {__file__} {__file__} -o x.mp4 --also {__file__}",
            "--also has no effect with several SRC",
        ),
        ("edit-basis --describe --v 1 --size 512", "--v, --size has no effect with --describe"),
    ],
)
def test_options_without_effect_are_refused(line: str, unused: str) -> None:
    result = CliRunner().invoke(cli, line.split())
    assert result.exit_code == 2
    assert unused in result.stderr


@pytest.mark.parametrize("name", ["README.md", "examples/TRAINING.md", "weights/README.md"])
def test_documents_name_only_existing_options(name: str) -> None:
    """In lines with one `export3d COMMAND` the options of that command, elsewhere those of any command."""
    text = (TESTS.parent / name).read_text(encoding="utf-8")
    every = {flag for _, option in OPTIONS for flag in (*option.opts, *option.secondary_opts)}
    other_programs = {"--data-binary", "--index-url", "--no-deps", "--nproc-per-node"}
    for line in text.splitlines():
        commands = re.findall(r"export3d(?:_cli)? ([a-z][a-z-]*)", line)
        of_command = {flag for command, option in OPTIONS if command in commands for flag in option.opts}
        known = (of_command if len(set(commands)) == 1 else every) | other_programs | {"--help"}
        assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) - known, line
