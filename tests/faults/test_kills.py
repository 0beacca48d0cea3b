"""Killed commands leave no partial output and no ffmpeg; running them again gives the result of an undisturbed run.

The slow test kills the commands 65 times at random moments; its last results are in README.md.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from faultkit import session_processes, spawn

from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# -N: killed before our handler was installed
CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}}
KINDS = ("reenact", "pictures", "preprocess", "workers", "train")
HANDLED = (signal.SIGTERM, signal.SIGINT)  # signals that the program can handle


class Job:
    """A command in its own folder, and checks of its output."""

    def __init__(self, kind: str, good: SimpleNamespace, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        folder.mkdir()
        if kind in ("reenact", "pictures"):
            out = folder / ("out.mp4" if kind == "reenact" else "frames/%05d.png")
            self.args = ["reenact", good.source, good.clip, "-o", out, "--weights", good.weights,
                         "--device", "cpu", "--precision", "fp32", "--overwrite"]  # fmt: skip
        elif kind in ("preprocess", "workers"):
            (folder / "videos").mkdir()
            for number in range(3):
                shutil.copy(good.clip, folder / f"videos/p{number}_0.mp4")
            self.args = ["preprocess", folder / "videos", "-o", folder / "data", "--size", "64", "--min-seconds", "0"]
            self.args += ["--workers", "2"] if kind == "workers" else []
        else:
            where = [f"run={folder / 'run'}", f"data.path=[{good.data}]", f"data.cache={folder / 'cache'}"]
            self.args = ["train", "--config", good.config, *where]

    def check_complete(self) -> None:
        """Check that every file with a final name is complete."""
        if self.kind == "reenact":
            if (self.folder / "out.mp4").exists():
                assert len(list(VideoReader(self.folder / "out.mp4"))) == 8
        elif self.kind == "pictures":
            if (self.folder / "frames").exists():
                assert [read_image(path).ndim for path in (self.folder / "frames").iterdir()] == [3] * 8
        elif self.kind != "train":
            for line in self._lines("data/manifest.jsonl"):
                assert len(list(VideoReader(self.folder / "data" / line["file"]))) == line["frames"] == 8
        else:
            for name in ("state.safetensors", "weights.safetensors"):
                path = self.folder / "run" / name
                if path.exists():
                    from safetensors import safe_open

                    with safe_open(path, framework="numpy") as file:
                        assert list(file.keys())

    def result(self) -> object:
        """Return everything a run writes, for comparison with an undisturbed run."""
        if self.kind == "reenact":
            return (self.folder / "out.mp4").read_bytes()
        if self.kind == "pictures":
            return {path.name: path.read_bytes() for path in (self.folder / "frames").iterdir()}
        if self.kind != "train":
            lines = self._lines("data/manifest.jsonl")
            return lines, [(self.folder / "data" / line["file"]).read_bytes() for line in lines]
        clocks = ("minutes", "seconds_a_step", "images_a_second")
        steps = [{k: v for k, v in line.items() if k not in clocks} for line in self._lines("run/stats.jsonl")]
        return steps, (self.folder / "run/weights.safetensors").read_bytes()

    def _lines(self, name: str) -> list[dict[str, object]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def temporary_names(self) -> list[str]:
        """List temporary files."""
        names = [p.name for p in self.folder.rglob("*") if ".part" in p.name or p.name.endswith(".tmp")]
        return sorted(names)


def start(job: Job) -> subprocess.Popen[bytes]:
    if job.kind == "pictures":  # existing pictures are never replaced
        shutil.rmtree(job.folder / "frames", ignore_errors=True)
    return spawn(job.args)


def kill_once(job: Job, number: signal.Signals, *, after: float = 0.0, when: str = "") -> int:
    """Start the job, kill it after `after` seconds or once a file matches `when`, and return its exit code."""
    work = start(job)
    started = time.monotonic()
    while work.poll() is None and time.monotonic() - started < 600:
        if any(job.folder.rglob(when)) if when else time.monotonic() - started > after:
            break
        time.sleep(0.02)
    work.send_signal(number)
    _, err = work.communicate(timeout=600)
    assert work.returncode in CODES[number] | {0}, err
    assert not (number in HANDLED and work.returncode > 0 and b"Traceback" in err), err
    deadline = time.monotonic() + 30
    while session_processes(work.pid, job.folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert session_processes(work.pid, job.folder) == [], "ffmpeg is still running"
    job.check_complete()
    if number in HANDLED and work.returncode > 0:
        assert job.temporary_names() == []
    return int(work.returncode)


def finish(job: Job) -> None:
    """Run the same command again to its end."""
    work = start(job)
    _, err = work.communicate(timeout=900)
    assert work.returncode == 0, err
    assert job.temporary_names() == []


CompleteRun = Callable[[str], tuple[object, float]]


@pytest.fixture(scope="session")
def complete_run(good: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> CompleteRun:
    """Return the output of an undisturbed job and the seconds it takes."""

    @functools.lru_cache
    def result(kind: str) -> tuple[object, float]:
        job = Job(kind, good, tmp_path_factory.mktemp("complete") / kind)
        began = time.monotonic()
        finish(job)
        return job.result(), time.monotonic() - began

    return result


CASES = [  # every kind and every signal once; the slow test has all combinations
    ("reenact", signal.SIGKILL, "*.part.mp4"),
    ("pictures", signal.SIGTERM, "00003.png"),
    ("workers", signal.SIGKILL, "*.part.mp4"),
    ("train", signal.SIGINT, "stats.jsonl"),
]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize(("kind", "number", "when"), CASES)
def test_killed_job_resumes_to_the_same_result(
    kind: str, number: signal.Signals, when: str, good: SimpleNamespace, tmp_path: Path,
    complete_run: CompleteRun,
) -> None:  # fmt: skip
    job = Job(kind, good, tmp_path / "job")
    kill_once(job, number, when=when)
    finish(job)
    assert job.result() == complete_run(kind)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_job_killed_at_random_moments_resumes_to_the_same_result(
    kind: str, good: SimpleNamespace, tmp_path: Path, complete_run: CompleteRun
) -> None:
    """Kill each job at 13 moments (65 in all); let it finish after every third kill."""
    rng, ends = random.Random(kind), Counter[str]()
    expected, seconds = complete_run(kind)
    job, round_ = Job(kind, good, tmp_path / "job0"), 0
    for number in range(13):
        chosen = SIGNALS[number % 3]
        code = kill_once(job, chosen, after=rng.uniform(0.0, seconds))
        ends[f"{chosen.name} {'finished before' if code == 0 else code}"] += 1
        if number % 3 == 2 or number == 12:
            finish(job)
            assert job.result() == expected
            round_ += 1
            job = Job(kind, good, tmp_path / f"job{round_}")
    print(json.dumps({kind: ends, "seconds": round(seconds, 1)}))
