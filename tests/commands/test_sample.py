"""`export3d sample`: the same person for the same number, marks, mixtures, and faces that the tracker finds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from export3d_cli.core import InputError, SampleOptions, find_marks, read_image, resolve_weights
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.model.head_sampler import HeadSampler
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


LARGE = cv2.imencode(".jpg", np.zeros((1040, 1040, 3), np.uint8))[1].ravel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"years": None}, "'years'"),
        ({"camera": np.zeros((3, 25), np.float32)}, "camera"),
        ({"camera": np.zeros((97, 25), np.float32)}, "landmarks of exemplar"),
        ({"landmarks": np.zeros((97, 478, 2), np.float32)}, "landmarks of exemplar"),
        ({"texture_points": np.full((478, 2), 6e4, np.float32)}, "landmarks of exemplar"),
        ({"shape_mean": np.full((478, 3), np.nan, np.float32)}, "shape_mean"),
        ({"ends": np.full(97, 7, np.int32)}, "pictures"),
        ({"pictures": np.zeros(64, np.uint8), "ends": np.full(97, 64, np.int32)}, "it is no JPEG"),
        ({"pictures": np.tile(LARGE, 97), "ends": LARGE.size * np.arange(1, 98)}, "it has 1040 x 1040 pixels"),
    ],
)
def test_damaged_weights_are_refused_in_one_line(
    change: dict[str, np.ndarray | None], message: str, tmp_path: Path
) -> None:
    arrays = {**HeadSampler.load(resolve_weights("export3d-sampler")).arrays, **change}
    bad = tmp_path / "bad.safetensors"
    HeadSampler.save(bad, {name: x for name, x in arrays.items() if x is not None}, {}, licence="")
    result = run("--weights", bad, "-o", tmp_path / "a.png")
    assert (result.exit_code, message in result.stderr, result.stderr.count("\n")) == (4, True, 1), result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-n", "0", "-o", "a.png"), 2, "0 is not in the range"),
        (("-n", "2", "-o", "a.png"), 2, "a.png cannot hold 2 picture(s): give a .png or .jpg for one"),
        (("-o", "a.mp4"), 2, "a.mp4 cannot hold 1 picture(s)"),
        (("-n", "2", "-o", "p/%03d.mp4"), 2, "%03d.mp4 cannot hold 2 picture(s)"),
        (("-n", "2", "-o", "p/%03d.jpg"), 2, "%03d.jpg cannot hold 2 picture(s): give a .png"),
        (("-o", "p/%03d.png", "--overwrite"), 2, "numbered pictures are never overwritten"),
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"truncation": math.nan}, "truncation must be 0 to 1.5, got nan"),
        ({"truncation": math.inf}, "truncation must be 0 to 1.5"),
        ({"mix": (-1, 2)}, "seed and mix 0 or more"),
        ({"mix": (1, 2), "age": (20, 30)}, "age has no effect on a mixture"),
        ({"at": (0.5, math.nan)}, "both ends of at 0 to 1"),
    ],
)
def test_unusable_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SampleOptions(**values)
