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
        (["-", "-o", "out"], "standard input"),
        (["nowhere", "-o", "out"], "does not exist"),
        ([__file__, "-o", "out", "--shard", "3/2"], "I from 1 to N"),
        ([__file__, "-o", "out", "--shard", "half"], "I from 1 to N"),
        ([__file__, "-o", "out", "--min-seconds", "9", "--max-seconds", "5"], "min <= max"),
        ([__file__, "-o", "out", "--overlay", "o.mp4"], "for one video"),
        ([example_path("source.jpg"), "-o", __file__], "cannot write to"),
    ],
)
def test_misuse_is_2_and_says_why(args, message):
    result = run("preprocess", *args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_photos_with_leading_dashes_and_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a b.jpg").write_bytes(example_path("source.jpg").read_bytes())
    result = run("preprocess", "-o", "out", "--size", "64", "--report", "--json", "--", "-a b.jpg")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["clips"] == 1
    assert (tmp_path / "out/clips/-a b-still.png").exists()
    assert (tmp_path / "out/report.png").exists()
