"""From a step's time and size to its rates: plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from megallama.config.schema import ModelConfig
from megallama.observe.mfu import model_flops, palm_flops


class Rates(NamedTuple):
    """The derived numbers of a `StepRecord`, under the same names."""

    tokens_per_s: float
    tokens_per_s_per_device: float
    tflops_per_device: float
    mfu: float | None
    mfu_palm: float | None


@dataclass(frozen=True)
class Meter:
    """What does not change from step to step.

    Nothing is excluded: the time given is the time counted. The first step of a start carries
    compilation, memory allocation and the communicators' set-up, and its low rates say so; whoever
    wants a steady state leaves that step out and says it.
    """

    model: ModelConfig
    seq_len: int
    """Tokens in a sequence: what PaLM's formula takes every token to attend."""
    devices: int
    peak_flops: float | None
    """FLOP/s of one device; None: no MFU."""

    def rates(self, step_time_s: float, tokens: int, attended_pairs: int) -> Rates:
        """Rates of a step over `tokens` of the global batch, padding and ignored ones included."""
        tokens_per_s = tokens / step_time_s
        device_seconds = step_time_s * self.devices
        flops = model_flops(self.model, tokens, attended_pairs) / device_seconds
        palm = palm_flops(self.model, tokens, self.seq_len) / device_seconds
        return Rates(
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_device=tokens_per_s / self.devices,
            tflops_per_device=flops / 1e12,
            mfu=flops / self.peak_flops if self.peak_flops else None,
            mfu_palm=palm / self.peak_flops if self.peak_flops else None,
        )


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """A loss in nats per token as bits per byte of text, which compares across tokenizers."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None
