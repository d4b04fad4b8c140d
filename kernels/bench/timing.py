"""Times of several implementations of one thing, in alternating rounds.

On a GPU a run is timed with events. Before each, a buffer much larger than the L2 cache is read, so
that inputs come from memory, and what the run before left unwritten is written. (Read, not written:
a written buffer would go to memory during the run.) The GPU is then kept asleep until the host has
queued the whole run, so that what counts is the GPU's time; the host's own is reported beside it.
The last lines that a run writes stay in L2 and are not counted: results of small shapes can lie
above the copy's bandwidth.

On CPU one run is timed with the host's clock, for dry runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROUNDS = 5
LEAST = 3
"""Runs in a round, however long they take."""
WARM_UP = 3
L2_MULTIPLE = 4
"""Size of the buffer that is read between runs, in L2 caches."""
LONGEST_SLEEP_S = 5e-3
"""Runs that wait for the GPU themselves would otherwise be given ever longer sleeps."""


@dataclass
class Samples:
    """Times of one implementation, in seconds, by round."""

    rounds: list[list[float]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """The median in ms, the least and the most of the rounds' medians, and the host's µs."""
        medians = [median(times) for times in self.rounds]
        return {
            "ms": 1e3 * median([x for times in self.rounds for x in times]),
            "ms_least": 1e3 * min(medians),
            "ms_most": 1e3 * max(medians),
            "host_us": 1e6 * median(self.host),
        }


Timed = tuple[Callable[[], Any], Callable[[Any], Any]]
"""What happens before the clock starts, and what is timed, which takes the result of the first."""


def alternate(timed: Mapping[str, Timed], seconds: float, device: torch.device) -> dict[str, Any]:
    """Summaries by implementation; each is run for about `seconds` in all."""
    on_gpu = device.type == "cuda"
    once = _once_on_gpu if on_gpu else _once_on_cpu
    rounds, least = (ROUNDS, LEAST) if on_gpu else (1, 1)
    sleeps = {name: _host_seconds(parts, device) for name, parts in timed.items()}
    samples = {name: Samples() for name in timed}
    for _ in range(rounds):
        for name, parts in timed.items():
            times: list[float] = []
            stop = time.perf_counter() + seconds / rounds
            while len(times) < least or time.perf_counter() < stop:
                taken, host = once(parts, sleeps[name], device)
                times.append(taken)
                samples[name].host.append(host)
            samples[name].rounds.append(times)
    return {name: found.summary() for name, found in samples.items()}


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a second of a large bfloat16 copy, read and written ones added up."""
    source = torch.randn(2**30 if device.type == "cuda" else 2**16, device=device).bfloat16()
    to = torch.empty_like(source)
    found = alternate({"copy": (lambda: None, lambda _: to.copy_(source))}, seconds, device)
    return 2 * source.nbytes / (1e-3 * found["copy"]["ms"])


def product_rate(device: torch.device, seconds: float) -> float:
    """FLOP/s of a bfloat16 product of random 8192 x 8192 matrices: zeros would be faster."""
    size = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    found = alternate(
        {"product": (lambda: None, lambda _: torch.mm(a, b, out=out))}, seconds, device
    )
    return 2 * size**3 / (1e-3 * found["product"]["ms"])


def _host_seconds(parts: Timed, device: torch.device) -> float:
    """How long the host takes to queue a run, after warming up; 0 where nobody asks."""
    prepare, run = parts
    taken = 0.0
    if device.type == "cpu":
        return taken
    for _ in range(WARM_UP):
        state = prepare()
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        run(state)
        taken = time.perf_counter() - began
    return taken


def _once_on_gpu(parts: Timed, host_s: float, device: torch.device) -> tuple[float, float]:
    prepare, run = parts
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    state = prepare()
    _flush_buffer(device).sum()
    sleep_s = min(LONGEST_SLEEP_S, 2 * host_s + 1e-4)
    torch.cuda._sleep(int(sleep_s * _cycles_per_second(device)))
    start.record()
    began = time.perf_counter()
    result = run(state)  # held until the clock has stopped: freeing is no part of it
    host = time.perf_counter() - began
    end.record()
    end.synchronize()
    del result
    return 1e-3 * start.elapsed_time(end), host


def _once_on_cpu(parts: Timed, _host_s: float, _device: torch.device) -> tuple[float, float]:
    prepare, run = parts
    state = prepare()
    began = time.perf_counter()
    result = run(state)
    taken = time.perf_counter() - began
    del result
    return taken, taken


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    size = L2_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.randn(size // 4, device=device)


@cache
def _cycles_per_second(device: torch.device) -> float:
    """Of the clock that `torch.cuda._sleep` counts."""
    cycles = 50_000_000
    for _ in range(2):  # the first wakes the clock up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize(device)
    return cycles / (1e-3 * start.elapsed_time(end))
