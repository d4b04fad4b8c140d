import math
from dataclasses import replace

import pytest

from megallama.observe import columns
from tests.observe.samples import EVAL, STEP


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3, "3"),
        (0.05, "0.05"),
        (999, "999"),
        (999.6, "1.00k"),
        (1234, "1.23k"),
        (99_999, "100k"),
        (8_030_261_248, "8.03B"),
        (15.6e12, "15.6T"),
        (None, "-"),
        (math.nan, "nan"),
    ],
)
def test_count(value, text):
    assert columns.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.4s"),
        (12, "12s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (7800, "2h10m"),
        (3 * 86400 + 4 * 3600, "3d04h"),
        (None, "-"),
        (math.inf, "-"),
    ],
)
def test_duration(seconds, text):
    assert columns.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (6.25, "6.2500"),
        (12345.678, "12345.7"),
        (1234567.0, "1234567"),
        (1e12, "1e+12"),
        (math.nan, "nan"),
        (None, "-"),
    ],
)
def test_decimal(value, text):
    assert columns.decimal(value, 7, 4) == text
    assert len(columns.decimal(value, 7, 4)) <= 7


EXTREMES = [
    STEP,
    replace(STEP, step=9_999_999, loss=math.nan, grad_norm=math.inf, mfu=0.675, lr=0.0),
    replace(STEP, loss=1e9, grad_norm=1e30, tokens_per_s=9.99e11, tflops_per_device=2500.0),
    replace(STEP, data_wait_s=STEP.step_time_s, bits_per_byte=99.9, memory_gib=191.5),
    replace(STEP, step_time_s=12345.6, tokens_per_s=0.01, tflops_per_device=1e-9),
]


@pytest.mark.parametrize("width", [20, 60, 80, 100, 200])
@pytest.mark.parametrize("record", EXTREMES)
def test_lines_align_with_their_titles_and_fit(width, record):
    shown = columns.fitting(width)
    line = columns.line(shown, columns.Row(record, 86400.0 * 99))
    assert len(line) == len(columns.header(shown)) <= width


def test_a_hundred_columns_show_everything_and_fewer_drop_the_least_important():
    assert columns.fitting(100) == columns.COLUMNS
    titles = [column.title for column in columns.fitting(60)]
    assert titles[:2] == ["step", "loss"]
    assert "data" not in titles
    assert "MFU" in [column.title for column in columns.fitting(80)]


def test_an_evaluation_stands_below_the_same_titles():
    shown = columns.COLUMNS
    title, line = columns.header(shown), columns.evaluation_line(shown, EVAL)
    end = title.index("loss") + len("loss")
    assert line[:end].endswith("5.5000")
    assert "held-out, 4.10k tokens in 1.2s" in line
