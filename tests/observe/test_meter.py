import math

import pytest

from megallama.config.schema import ModelConfig
from megallama.observe.meter import Meter, bits_per_byte

# Matrix weights: 1 layer * (10·(10+2·10) + 10·10 + 3·10·20) + 10·100 = 2000.
MODEL = ModelConfig(hidden=10, layers=1, heads=1, kv_heads=1, head_dim=10, ffn=20, vocab=100)


def test_rates():
    meter = Meter(MODEL, seq_len=100, devices=4, peak_flops=1e6)
    rates = meter.rates(step_time_s=2.0, tokens=400, attended_pairs=1000)
    assert rates.tokens_per_s == 200.0
    assert rates.tokens_per_s_per_device == 50.0
    flops = 6 * 2000 * 400 + 12 * 10 * 1000
    assert rates.tflops_per_device == pytest.approx(flops / 2 / 4 / 1e12, rel=1e-12)
    assert rates.mfu == pytest.approx(flops / 2 / 4 / 1e6, rel=1e-12)
    palm = (6 * 2000 + 12 * 10 * 100) * 400
    assert rates.mfu_palm == pytest.approx(palm / 2 / 4 / 1e6, rel=1e-12)


def test_without_a_peak_there_is_no_mfu_and_all_else():
    with_peak = Meter(MODEL, 100, 4, 1e6).rates(2.0, 400, 1000)
    without = Meter(MODEL, 100, 4, None).rates(2.0, 400, 1000)
    assert without == with_peak._replace(mfu=None, mfu_palm=None)


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), 1.0) == pytest.approx(1.0)
    assert bits_per_byte(2 * math.log(2), 4.0) == pytest.approx(0.5)
    assert bits_per_byte(1.0, None) is None
