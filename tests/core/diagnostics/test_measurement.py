import sys

import numpy as np
import pytest
import torch

from export3d_cli.core.diagnostics.measurement import measure, process_peak_memory


def test_measure_returns_the_median_of_the_repeats(monkeypatch):
    ticks = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    runs = []
    seconds, _ = measure(lambda: runs.append(1), torch.device("cpu"), repeats=3)
    assert seconds == 2.0 and len(runs) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is known on Linux only")
def test_measure_peak_memory_is_that_of_the_run():
    cpu = torch.device("cpu")
    _, large = measure(lambda: np.ones(60 * 2**20, np.uint8), cpu)
    _, small = measure(lambda: None, cpu)
    if large is None or small is None:
        pytest.skip("no /proc here")
    assert large - small > 40 * 2**20 and process_peak_memory() > 40 * 2**20
