"""What the training loop tells those who watch it, and what a watcher is.

The loop calls one observer on one rank: the one that has the loss, on the last pipeline stage.
Numbers in a record are global unless their name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """A run, as it is known when a start of it begins."""

    run_folder: str
    config: dict[str, Any]
    """The resolved config as plain data."""
    model: str
    """Name of the preset, or what stands for one."""
    parameters: int
    layout: str
    """Like `TP2 · PP2 · DP1`."""
    world_size: int
    """Devices."""
    device: str
    """Name of one device, as its driver reports it."""
    data: str
    """One line on what is read."""
    kernels: str = ""
    """One line on what computes the fused operations and attention."""
    resumed_step: int = 0
    """Completed steps found in the checkpoint this start continues; 0 for a new run."""
    peak_flops: float | None = None
    """FLOP/s of one device in the precision used; None if unknown: then there is no MFU."""


@dataclass(frozen=True)
class StepRecord:
    """One completed optimizer step."""

    step: int
    """1 for the first."""
    steps: int
    """Steps in the whole run."""
    attempt: int
    """Which start of the run did it."""
    loss: float
    """Nats per token: the mean over the valid tokens of the global batch."""
    bits_per_byte: float | None
    """The loss per byte of text, in bits; None where bytes are unknown."""
    lr: float
    grad_norm: float
    """Norm of the global gradient before clipping."""
    tokens: int
    """Read so far in the run."""
    batch_tokens: int
    """Read in this step."""
    valid_tokens: int
    """Those of them that have a loss."""
    step_time_s: float
    """Wall-clock time of the step, the wait for data included."""
    data_wait_s: float
    """Part of it spent waiting for data."""
    tokens_per_s: float
    """All devices together."""
    tokens_per_s_per_device: float
    tflops_per_device: float
    """Model TFLOP/s: causal, document-exact, recomputation not counted."""
    mfu: float | None
    """`tflops_per_device` over the device's peak, 0 to 1."""
    mfu_palm: float | None
    """The same by PaLM's formula, which counts attention without the causal mask."""
    memory_gib: float
    """Peak of this step on the device; on CPU the process's resident set."""
    timestamp: float
    """Unix time at the end of the step, seconds."""


@dataclass(frozen=True)
class EvalRecord:
    """Loss on held-out documents after a step."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float | None
    tokens: int
    """Tokens the loss is a mean over."""
    seconds: float


class Observer(Protocol):
    """Something that watches: it may be removed without changing a number of the run."""

    def start(self, info: RunInfo) -> None:
        """The first step is about to begin."""

    def step(self, record: StepRecord) -> None:
        """A step is complete."""

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is complete."""

    def message(self, text: str) -> None:
        """Something a person wants to know, like `saved checkpoint step 50`."""

    def close(self, ok: bool) -> None:
        """Nothing follows; `ok` if the run did what it was asked."""
