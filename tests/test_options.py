"""Values of options, whatever is typed: ranges and rates are understood exactly or refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from export3d_cli import options
from export3d_cli.main import cli

RATE, RANGE = options.FrameRate(), options.NumberRange()
FINITE = st.floats(-999_999, 999_999)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_fraction_is_that_fraction(above: int, below: int) -> None:
    assume(above <= 1000 * below)
    assert RATE.convert(f"{above}/{below}", None, None) == Fraction(above, below)


@settings(deadline=None)
@given(st.integers(1, 1000), st.sampled_from(["", ".0", ".00"]))
def test_a_whole_rate_is_that_rate(rate: int, end: str) -> None:
    assert RATE.convert(f"{rate}{end}", None, None) == rate


@settings(deadline=None)
@given(st.sampled_from([24, 30, 48, 60, 120, 240]), st.integers(2, 6))
def test_a_rounded_television_rate_is_the_exact_one(rate: int, digits: int) -> None:
    exact = Fraction(rate * 1000, 1001)
    assert RATE.convert(f"{float(exact):.{digits}f}", None, None) == exact


@settings(deadline=None)
@given(st.decimals(Fraction(1, 1000), 1000, places=3))
def test_a_decimal_is_itself_or_a_television_rate_very_near(rate: Fraction) -> None:
    got = RATE.convert(str(rate), None, None)
    assert got == Fraction(rate) or (
        got.denominator in {7, 11, 13, 77, 91, 143, 1001} and abs(got / Fraction(rate) - 1) < 3e-4
    )


@settings(deadline=None)
@given(st.text())
def test_other_texts_are_refused_or_positive(text: str) -> None:
    for kind in (RATE, RANGE):
        try:
            got = kind.convert(text, None, None)
        except click.BadParameter:
            continue
        assert 0 < got <= 1000 if kind is RATE else all(abs(end) < 1e6 for end in got)


@pytest.mark.parametrize("text", ["0", "-25", "1/0", "1e400000000", "nan", "inf", "1001", "25/1/1", "٢٥", ""])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="frame rate"):
        RATE.convert(text, None, None)


@settings(deadline=None)
@given(FINITE, FINITE)
def test_a_range_is_its_two_ends(first: float, last: float) -> None:
    assert RANGE.convert(f"{first}:{last}", None, None) == (first, last)
    assert RANGE.convert(str(first), None, None) == (first, first)


@pytest.mark.parametrize("text", [":", "1:", ":2", "1:2:3", "a", "nan", "0:inf", "1e6:0", ""])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="A:B"):
        RANGE.convert(text, None, None)


@pytest.mark.parametrize("args", [["-", "x.mp4"], ["x.jpg", "-"]])
def test_standard_input_is_refused_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in args:
        Path(name).touch()  # even where there is a file of that name
    result = CliRunner().invoke(cli, ["reenact", "-o", "out.mp4", "--", *args])
    assert result.exit_code == 2
    assert "standard input" in " ".join(result.stderr.split())
