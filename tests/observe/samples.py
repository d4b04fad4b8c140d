"""Records for the tests: every field set, any of them replaceable."""

from dataclasses import replace

from megallama.observe.record import EvalRecord, RunInfo, StepRecord

STEP = StepRecord(
    step=1,
    steps=100,
    attempt=0,
    loss=6.25,
    bits_per_byte=None,
    lr=3e-4,
    grad_norm=1.5,
    tokens=1000,
    batch_tokens=1000,
    valid_tokens=900,
    step_time_s=0.5,
    data_wait_s=0.05,
    tokens_per_s=2000.0,
    tokens_per_s_per_device=1000.0,
    tflops_per_device=0.125,
    mfu=None,
    mfu_palm=None,
    memory_gib=2.5,
    timestamp=1000.0,
)
EVAL = EvalRecord(step=10, loss=5.5, bits_per_byte=1.75, tokens=4096, seconds=1.25)
INFO = RunInfo(
    run_folder="runs/sample",
    config={"train": {"steps": 100}},
    model="tiny",
    parameters=1_234_567,
    layout="TP2 · PP1 · DP1",
    world_size=2,
    device="a device",
    data="stdlib",
)


def step(number: int, **changes) -> StepRecord:
    values = {"step": number, "tokens": 1000 * number, "timestamp": 1000.0 + number / 2} | changes
    return replace(STEP, **values)
