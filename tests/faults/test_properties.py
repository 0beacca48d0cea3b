"""Property tests: readers of configurations, motion and manifests return valid data or raise the documented error."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import yaml
from bad_numbers import npz
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from export3d_cli.core.animation.expression_controls import ExpressionEdit
from export3d_cli.core.config.loading import load_train_config, make_train_config, model_config_from_dict, to_dict
from export3d_cli.core.config.schema import PRESETS, TrainConfig
from export3d_cli.core.dataset.preprocess import DatasetManifest
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import ConfigError, InputError
from export3d_cli.options import NumberRange

YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from([*to_dict(TrainConfig()), *to_dict(PRESETS["tiny"]), "nothing"])
DTYPES = st.sampled_from(["f4", "f8", "f2", "i4", "u1", "?", "c8", "U3", "S2", "M8[s]", "O"])
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=120, deadline=None)
@given(data=st.dictionaries(KEYS, YAML_VALUES | st.dictionaries(KEYS, YAML_VALUES, max_size=3), max_size=4))
def test_configuration_from_any_dict_is_valid_or_refused(data: dict[str, Any]) -> None:
    try:
        config = make_train_config({"preset": "tiny", **data})
    except ConfigError:
        return
    numbers = [v for v in vars(config).values() if isinstance(v, (int, float))]
    assert all(math.isfinite(v) and v >= 0 for v in numbers)
    assert make_train_config(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@settings(max_examples=120, deadline=None)
@given(data=st.dictionaries(KEYS, YAML_VALUES, max_size=4) | YAML_VALUES)
def test_model_config_from_any_header_is_valid_or_refused(data: Any) -> None:
    try:
        config = model_config_from_dict({**to_dict(PRESETS["tiny"]), **data} if isinstance(data, dict) else data)
    except ConfigError:
        return
    assert config.image_size % 16 == 0 < config.image_size <= 2048


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=200) | st.binary(max_size=200), override=st.text(max_size=30))
def test_any_text_as_configuration_is_loaded_or_refused(text: str | bytes, override: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        for overrides in ((), (override,)):
            try:
                load_train_config(path, overrides)
            except ConfigError:
                continue


ARRAYS = st.tuples(DTYPES, SHAPES).filter(lambda a: a[0] != "O").flatmap(lambda a: np_st.arrays(np.dtype(a[0]), a[1]))
FIELDS = ("beta", "camera", "landmarks", "found", "fps", "crop", "size")


def motion_arrays(frames: int = 2) -> dict[str, np.ndarray]:
    pose = np.tile(np.concatenate([np.eye(4).ravel(), np.zeros(9)]), (frames, 1))
    return {
        "beta": np.zeros((frames, 64)), "camera": pose, "landmarks": np.zeros((frames, 478, 3)),
        "found": np.ones(frames, bool), "fps": np.array([25, 1]), "crop": np.array([0.0, 0.0, 64.0]),
        "size": np.array([64, 64]),
    }  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    replaced=st.dictionaries(st.sampled_from(FIELDS), ARRAYS, max_size=2),
    missing=st.sets(st.sampled_from(FIELDS), max_size=1),
    rate=st.none() | st.tuples(st.integers(-(2**62), 2**62), st.integers(-(2**62), 2**62)),
    value=st.floats(width=32), index=st.integers(0, 2**20),
    corrupted=st.sampled_from(["", "beta", "camera", "landmarks", "crop"]),
)  # fmt: skip
def test_motion_file_with_any_arrays_is_valid_or_refused(
    replaced: dict[str, np.ndarray], missing: set[str], rate: tuple[int, int] | None, value: float, index: int,
    corrupted: str,
) -> None:  # fmt: skip
    arrays = motion_arrays()
    if corrupted:
        arrays[corrupted].flat[index % arrays[corrupted].size] = value
    if rate is not None:
        arrays["fps"] = np.array(rate)
    arrays |= replaced
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.motion.npz"
        path.write_bytes(npz({k: v for k, v in arrays.items() if k not in missing}))
        try:
            motion = Motion.load(path)
        except InputError:
            return
        assert len(motion) > 0
        assert Fraction(1, 1000) <= motion.fps <= 1000
        for name in ("beta", "camera", "landmarks"):
            array = getattr(motion, name)
            assert array.dtype == np.float32
            assert np.isfinite(array).all()
        motion.save(path)
        again = Motion.load(path)
        assert all(np.array_equal(getattr(again, name), getattr(motion, name)) for name in ("beta", "camera", "found"))
        assert (again.fps, again.crop, again.size) == (motion.fps, motion.crop, motion.size)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LINES = st.dictionaries(st.sampled_from(["id", "source", "file", "motion", "frames", "failed", "reason"]), JSON_VALUES)


@settings(max_examples=80, deadline=None)
@given(lines=st.lists(LINES | JSON_VALUES, max_size=4), junk=st.binary(max_size=9))
def test_manifest_of_any_lines_is_valid_or_refused(lines: list[Any], junk: bytes) -> None:
    with TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "manifest.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + junk)
        try:
            manifest = DatasetManifest(out)
        except InputError:
            return
        manifest.write()
        again = DatasetManifest(out)
        assert [str(row["id"]) for row in again.clips] == [str(row["id"]) for row in manifest.clips]
        assert again.finished_sources >= {str(line.get("source", line["id"])) for line in manifest.clips}


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20) | st.from_regex(r"[-+0-9.e:naif]{0,12}", fullmatch=True), name=st.text(max_size=9))
def test_set_of_any_text_is_a_valid_edit_or_refused(text: str, name: str) -> None:
    try:
        low, high = NumberRange().convert(text, None, None)
        ExpressionEdit({name if len(text) % 2 else "jawOpen": (low, high)})
    except (click.BadParameter, InputError) as error:
        message = str(error)
    else:
        message = ""
        assert 0 <= low <= 1 and 0 <= high <= 1
    assert "\n" not in message and len(message) < 300
