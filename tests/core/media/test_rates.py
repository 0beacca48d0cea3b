"""Frame rates estimated from timestamps, and motion rows at another rate (property-based)."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from export3d_cli.core.face.motion import resample_rows
from export3d_cli.core.media import probe

TELEVISION = [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)]
RATES = st.sampled_from([*TELEVISION, *map(Fraction, (10, 12, 15, 24, 25, 30, 48, 50, 60)), Fraction(25, 2)])


@settings(deadline=None)
@example(Fraction(60000, 1001), 3, 90000, 3)  # both ends are rounded by half a tick
@given(RATES, st.integers(3, 300), st.sampled_from([1000, 12800, 90000]), st.integers(0, 2000))
def test_estimate_rate_of_constant_rate_is_exact(rate: Fraction, frames: int, ticks: int, start: int) -> None:
    tick = Fraction(1, ticks)
    times = [round((start + k) / rate / tick) * tick for k in range(frames)]
    reported = probe._parse_rate(f"{float(rate):.2f}".rstrip("0").rstrip(".") + " fps", "fps")  # ffmpeg's format
    assert probe._estimate_rate(tick, times, reported, reported) == (rate, False)


@settings(deadline=None)
@given(RATES, st.integers(20, 200), st.sets(st.integers(3, 18), min_size=2, max_size=5))
def test_estimate_rate_with_missing_frames_is_variable(rate: Fraction, frames: int, holes: set[int]) -> None:
    tick = Fraction(1, 90000)
    times = [round(k / rate / tick) * tick for k in range(frames) if k not in holes]
    reported = probe._parse_rate(f"{float(rate):.2f} tbr", "tbr")
    fps, is_variable = probe._estimate_rate(tick, times, None, reported)
    assert is_variable
    assert fps == min(rate, Fraction(60))


@settings(deadline=None)
@given(
    st.integers(1, 500), RATES, RATES, st.floats(0, 30), st.one_of(st.none(), st.floats(0.001, 30)),
)  # fmt: skip
def test_select_rows_at_another_rate_keeps_duration(
    count: int, source_fps: Fraction, fps: Fraction, start: float, duration: float | None
) -> None:
    rows = resample_rows(count, source_fps, fps, start, duration)
    first = round(start * source_fps)
    last = count if duration is None else min(count, first + round(duration * source_fps))
    if first >= last:
        assert len(rows) == 0
        return
    assert (rows[0], len(rows)) == (first, max(1, round((last - first) * fps / source_fps)))
    assert (rows[1:] >= rows[:-1]).all()
    assert rows[-1] < last
    assert abs(len(rows) / fps - (last - first) / source_fps) <= max(1 / fps, 1 / source_fps)
