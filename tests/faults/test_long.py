"""Long runs: memory stays flat, frames are exact, sound stays in step, and two processes do no harm to each other.

All but the last are slow; their last results stand in README.md of this folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faultkit import command_line, list_names, memory_mib, run, spawn

from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.weights import example_path

MINUTES = int(os.environ.get("FAULTS_MINUTES", "10"))
BEEP_EVERY = 60  # seconds


def make_long_driver(path: Path) -> int:
    """The bundled driver over and over, with a beep at the beginning of every minute; its number of frames."""
    tone = "aevalsrc='if(lt(mod(t,{every}),0.1),sin(2*PI*1000*t),0)':s=16000:d={all}"
    sound = tone.format(every=BEEP_EVERY, all=MINUTES * 60)
    frames = MINUTES * 60 * 25
    inputs = ["-stream_loop", "-1", "-i", str(example_path("drive.mp4")), "-f", "lavfi", "-i", sound]
    picture = ["-vf", "scale=256:256,settb=1/25,setpts=N", "-r", "25", "-frames:v", str(frames), "-c:v", "libx264"]
    maps = ["-map", "0:v", "-map", "1:a", *picture, "-preset", "ultrafast", "-c:a", "aac", str(path)]
    subprocess.run([ffmpeg_path(), "-loglevel", "error", *inputs, *maps], check=True)
    return frames


def count_packets(path: Path, stream: str) -> int:
    """How many packets a stream has."""
    listing = [
        ffmpeg_path(),
        "-loglevel",
        "error",
        "-i",
        str(path),
        "-map",
        stream,
        "-c",
        "copy",
        "-f",
        "framecrc",
        "-",
    ]
    lines = subprocess.run(listing, check=True, capture_output=True).stdout.splitlines()
    return sum(not line.startswith(b"#") for line in lines)


def find_beeps(path: Path) -> np.ndarray:
    """Seconds at which beeps begin."""
    decode = [
        ffmpeg_path(),
        "-loglevel",
        "error",
        "-i",
        str(path),
        "-map",
        "0:a",
        "-ac",
        "1",
        "-ar",
        "16000",
        "-f",
        "s16le",
        "-",
    ]
    sound = np.frombuffer(subprocess.run(decode, check=True, capture_output=True).stdout, np.int16)
    loud = np.flatnonzero(np.abs(sound.astype(np.int32)) > 5000) / 16000
    return loud[np.diff(loud, prepend=-10) > 1]


def resident_kib(pid: int) -> int:
    """KiB that a process has in memory; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


@pytest.mark.slow
def test_reenact_ten_minutes_keeps_memory_frames_and_sound(good: SimpleNamespace, tmp_path: Path) -> None:
    driver, out = tmp_path / "long.mp4", tmp_path / "out.mp4"
    frames = make_long_driver(driver)
    assert count_packets(driver, "0:v") == frames
    began = time.monotonic()
    args = ["reenact", good.source, driver, "-o", out, "--weights", good.weights, "--device", "cpu", "--batch", "4"]
    work = spawn([*args, "--precision", "fp32", "--json"])
    samples: list[tuple[float, int]] = []

    def watch() -> None:
        while work.poll() is None:
            samples.append((time.monotonic() - began, resident_kib(work.pid)))
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stdout, err = work.communicate()
    watcher.join()
    assert work.returncode == 0, err
    seconds, size = np.array([sample for sample in samples if sample[1]], float).T
    settled = seconds > seconds[-1] * 0.2
    slope = np.polyfit(seconds[settled], size[settled] / 1024, 1)[0] * seconds[-1]  # MiB over the whole run
    output_beeps, driver_beeps = find_beeps(out), find_beeps(driver)
    report = {
        "frames": json.loads(stdout)["frames"], "seconds": round(seconds[-1]), "slope_mib": round(slope, 2),
        "peak_mib": round(size.max() / 1024),
        "beeps_ms": [round(1000 * d, 1) for d in (output_beeps - driver_beeps)[[0, -1]]],
    }  # fmt: skip
    print(json.dumps(report))
    assert json.loads(stdout)["frames"] == count_packets(out, "0:v") == frames
    assert abs(slope) < 25, report
    assert len(output_beeps) == len(driver_beeps) == MINUTES
    assert np.abs(output_beeps - driver_beeps).max() < 0.04, report


@pytest.mark.slow
def test_two_hundred_jobs_in_one_process_leak_nothing(good: SimpleNamespace, tmp_path: Path) -> None:
    sizes, descriptors, threads = [], [], []
    jobs = [
        ["reenact", good.source, good.clip, "-o", tmp_path / "out.mp4", "--weights", good.weights],
        ["reenact", good.source, good.motion, "-o", tmp_path / "out.webm", "--weights", good.weights],
        ["novel-view", good.source, "-o", tmp_path / "view.png", "--yaw", "10", "--weights", good.weights],
        ["reenact", good.source, good.folder / "nothing.mp4", "-o", tmp_path / "no.mp4"],
    ]
    for number in range(200):
        job = jobs[number % len(jobs)]
        more = [] if job[-1] == tmp_path / "no.mp4" else ["--overwrite", "--device", "cpu", "--precision", "fp32"]
        ended = run(*job, *more)
        assert ended.exit_code == (2 if number % len(jobs) == 3 else 0), ended.stderr
        sizes.append(memory_mib())
        descriptors.append(len(os.listdir("/proc/self/fd")))
        threads.append(threading.active_count())
    slope = np.polyfit(np.arange(100, 200), sizes[100:], 1)[0] * 100
    print(json.dumps({"mib_at_40_120_200": sizes[39::80], "mib_over_the_last_100": round(slope, 2)}))
    assert slope < 20, sizes[::10]
    assert descriptors[-1] <= descriptors[20]
    assert threads[-1] <= threads[20]
    assert list_names(tmp_path) == ["out.mp4", "out.webm", "view.png"]


def run_twice_at_once(args: list[object]) -> tuple[list[int], list[bytes]]:
    """The same command twice at once: exit codes and what they say."""
    processes = [spawn(args), spawn(args)]
    messages = [process.communicate(timeout=900)[1] for process in processes]
    return [process.returncode for process in processes], messages


@pytest.mark.slow
def test_two_processes_with_one_output(good: SimpleNamespace, tmp_path: Path) -> None:
    """Reenact writes one complete result. Preprocess and train: one waits or stops, or both finish completely."""
    args = ["reenact", good.source, good.clip, "-o", tmp_path / "out.mp4", "--weights", good.weights, "--device", "cpu",
            "--precision", "fp32", "--overwrite"]  # fmt: skip
    codes, messages = run_twice_at_once(args)
    assert codes == [0, 0], messages
    assert probe(tmp_path / "out.mp4").frame_count == len(list(VideoReader(tmp_path / "out.mp4"))) == 8
    assert list_names(tmp_path) == ["out.mp4"]

    data = tmp_path / "data"
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(4):
        (videos / f"p{number}_0.mp4").write_bytes(good.clip.read_bytes())
    args = ["preprocess", videos, "-o", data, "--max-frames", "6", "--min-seconds", "0"]
    codes, messages = run_twice_at_once(args)
    assert 0 in codes, messages
    assert set(codes) <= {0, 1}, messages
    lines = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [f"p{number}_0" for number in range(4)]
    assert [p.name for p in data.rglob(".*part*")] == []

    args = [
        "train",
        "--config",
        good.config,
        f"run={tmp_path / 'run'}",
        f"data.path=[{good.data}]",
        f"data.cache={tmp_path / 'c'}",
    ]
    codes, messages = run_twice_at_once(args)
    assert 0 in codes, messages
    assert set(codes) <= {0, 1}, messages
    steps = []
    for run_ in ("run", "alone"):  # the shared run once more, and an undisturbed one
        line = command_line(*args[:3], f"run={tmp_path / run_}", *args[4:])
        again = subprocess.run(line, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
        stats = (tmp_path / run_ / "stats.jsonl").read_text().splitlines()
        steps.append([(json.loads(line)["stage"], json.loads(line)["step"]) for line in stats])
    assert steps[0] == steps[1]
