"""What is counted, against closed forms; what is measured, for being there at all."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from export3d_cli.core.diagnostics import machine
from export3d_cli.core.diagnostics.machine import OpCounter, PeakMemory


def work(run):
    with torch.inference_mode(), OpCounter() as counter:
        run()
    return counter.work


def test_products_count_two_a_multiply_add():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    found = work(lambda: a @ b)
    assert found.flops == {"fp32": 2 * 3 * 5 * 7}
    assert found.bytes == 4 * (3 * 5 + 5 * 7 + 3 * 7)


def test_layers_count_by_their_parts():
    linear, conv = nn.Linear(6, 4), nn.Conv2d(2, 8, 3, padding=1)
    assert work(lambda: linear(torch.zeros(10, 6))).flops == {"fp32": 2 * 10 * 6 * 4}
    x = torch.zeros(1, 2, 9, 9)
    found = work(lambda: conv(x))
    assert found.flops == {"fp32": 2 * 8 * 81 * 2 * 9}
    assert found.bytes == pytest.approx(4 * (2 * 81 + 8 * 2 * 9 + 8 + 8 * 81))


def test_attention_is_counted_on_the_cpu():
    q = torch.zeros(2, 3, 16, 8)  # two products of 16 x 16 x 8 for each of 6 heads
    assert work(lambda: F.scaled_dot_product_attention(q, q, q)).flops == {"fp32": 2 * 2 * 6 * 16 * 16 * 8}


def test_precision_is_that_of_the_operation():
    a = torch.zeros(4, 4)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a @ a
        a @ a

    assert work(run).flops == {"bf16": 128, "fp32": 128}


def test_views_cost_nothing_and_writing_in_place_does():
    a = torch.zeros(8, 4)
    assert work(lambda: a.view(4, 8).T.expand(3, 8, 4)[1]).bytes == 0
    assert work(lambda: a + 1).bytes == 2 * 4 * 32
    assert work(lambda: a.add_(1)).bytes == 2 * 4 * 32
    one = torch.ones(1)
    assert work(lambda: one.expand(1000) + 1).bytes == 4 + 4000


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr(machine, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 2**20})
    found = machine.measure_machine(torch.device("cpu"), "bf16")
    assert list(found.matrix) == ["fp32", "bf16"] and all(rate > 0 for rate in found.matrix.values())
    assert found.bandwidth > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told by Linux alone")
def test_peak_forgets_what_was():
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    large = np.ones(60 * 2**20, np.uint8)
    with_large = peak.bytes()
    del large
    peak.start()
    without = peak.bytes()
    if with_large is None:
        pytest.skip("no /proc here")
    assert with_large - without > 40 * 2**20 and machine.process_peak_memory() > 40 * 2**20
