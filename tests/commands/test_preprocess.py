import json

import pytest
from click.testing import CliRunner

from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", "-o", "out"], "does not exist"),
        ([__file__, "-o", "out", "--shard", "3/2"], "1 <= I <= N"),
        ([__file__, "-o", "out", "--shard", "half"], "1 <= I <= N"),
        ([__file__, "-o", "out", "--min-seconds", "9", "--max-seconds", "5"], "min <= max"),
        ([__file__, "-o", "out", "--overlay", "o.mp4"], "--overlay applies to a motion file"),
        ([__file__, "-o", "out", "--face", "largest", "--fps", "25"], "--fps, --face applies to a motion file"),
        ([__file__, "-o", "x.motion.npz", "--size", "256"], "--size applies to a data set"),
        ([__file__, "-o", "x.motion.npz", "--max-yaw", "65"], "--max-yaw applies to a data set"),
        ([__file__, "-o", "x.motion.npz", "--min-face", "3"], "--min-face, --max-yaw applies to a data set"),
        (
            [__file__, "-o", "x.motion.npz", "--person", "name", "--shard", "1/2", "--report", "--workers", "1"],
            "--workers, --person, --shard, --report applies to a data set",
        ),
        ([example_path("source.jpg"), "-o", __file__], "cannot write to"),
    ],
)
def test_preprocess_invalid_options_exit_2_with_a_reason(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("preprocess", *args)
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
    assert message in " ".join(result.stderr.split())


def test_preprocess_file_name_with_leading_dash_and_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a b.jpg").write_bytes(example_path("source.jpg").read_bytes())
    result = run("preprocess", "-o", "out", "--size", "64", "--report", "--json", "--", "-a b.jpg")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["clips"] == 1
    assert (tmp_path / "out/clips/-a b-still.png").exists()
    assert (tmp_path / "out/report.png").exists()
