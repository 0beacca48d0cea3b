"""`export3d sample`: the same person for the same number, marks, mixtures, and faces that the tracker finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from export3d_cli.core import find_marks, read_image
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.main import cli


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["sample", *map(str, arguments)])


def test_a_number_is_a_person(tmp_path: Path) -> None:
    result = run("-n", 3, "--seed", 4, "-o", tmp_path / "people/%03d.png")
    assert result.exit_code == 0, result.output
    people = sorted((tmp_path / "people").iterdir())
    assert [path.name for path in people] == ["000.png", "001.png", "002.png"]
    assert run("--seed", 5, "-o", tmp_path / "5.png", "--watermark", "invisible").exit_code == 0
    np.testing.assert_array_equal(read_image(people[1]), read_image(tmp_path / "5.png"))
    assert run("--seed", 5, "-o", tmp_path / "again.png").exit_code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "5.png").read_bytes()
    for path in people:
        marks = find_marks(path)
        assert marks.metadata
        assert marks.invisible
        motion = open_landmarker_tracker().track_crops([read_image(path)], independent=True)
        assert motion is not None
        assert motion.found[0]
    refused = run("--seed", 5, "-o", tmp_path / "5.png")
    assert refused.exit_code == 2
    assert "exists" in refused.stderr


def test_a_walk_begins_and_ends_with_its_persons(tmp_path: Path) -> None:
    plain = ("--watermark", "none", "-o")
    assert run("-n", 3, "--mix", 1, 2, "--at", "0:1", *plain, tmp_path / "walk/%d.png").exit_code == 0
    for name, seed in (("0", 1), ("2", 2)):
        assert run("--seed", seed, *plain, tmp_path / f"{seed}.png").exit_code == 0
        np.testing.assert_array_equal(read_image(tmp_path / f"walk/{name}.png"), read_image(tmp_path / f"{seed}.png"))


def test_truncation_and_age_change_the_person(tmp_path: Path) -> None:
    pictures = []
    for k, options in enumerate(((), ("--truncation", "0"), ("--age", "65:70"), ("--age", "20:25"))):
        assert run(*options, "-o", tmp_path / f"{k}.png").exit_code == 0
        pictures.append(read_image(tmp_path / f"{k}.png").astype(int))
    for k, a in enumerate(pictures):
        for b in pictures[k + 1 :]:
            assert np.abs(a - b).mean() > 0.3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-n", "0", "-o", "a.png"), 2, "0 is not in the range"),
        (("-n", "2", "-o", "a.png"), 2, "a.png can hold no 2 pictures: name them, for example people/%03d.png"),
        (("-o", "a.mp4"), 2, "a.mp4 can hold no 1 pictures"),
        (("--age", "150:200", "-o", "a.png"), 2, "age 150:200 cannot be sampled: give "),
        (("--age", "60:30", "-o", "a.png"), 2, "age 60:30 cannot be sampled"),
        (("--at", "0.2", "-o", "a.png"), 2, "--at has no effect with one person: give --mix A B"),
        (("--mix", "1", "2", "--seed", "3", "-o", "a.png"), 2, "--seed has no effect with --mix"),
        (("--mix", "1", "2", "--at", "0:2", "-o", "a.png"), 2, "both ends of at 0 to 1"),
        (("--weights", "export3d-open", "-o", "a.png"), 4, "holds no sampler: format is 'export3d-1'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not [*tmp_path.iterdir()]
