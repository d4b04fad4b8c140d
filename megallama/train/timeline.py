"""When each forward and backward of a step really ran, written to RUN/timeline.jsonl."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megallama.observe.timeline_reader import FILE
from megallama.parallel.pipeline.schedule import Action
from megallama.train.step import Trainer


class Timeline:
    """Times the actions of one step on one rank, from a moment that the pipeline's ranks share."""

    def __init__(self, trainer: Trainer) -> None:
        self._cuda = trainer.stages.device.type == "cuda"
        self._taken: list[tuple[Action, Any, Any]] = []
        dist.barrier(group=trainer.groups.pipeline.group)
        self._began = self._now()

    @contextmanager
    def watch(self, action: Action) -> Iterator[None]:
        """Time what runs inside."""
        start = self._now()
        yield
        self._taken.append((action, start, self._now()))

    def spans(self) -> list[dict[str, Any]]:
        """What ran when, in seconds since the start; waits for the device."""
        return [
            {
                "kind": str(action.kind),
                "stage": action.stage,
                "micro_batch": action.micro_batch,
                "start_s": self._since(start),
                "stop_s": self._since(stop),
            }
            for action, start, stop in self._taken
        ]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, moment: Any) -> float:
        if not self._cuda:
            return moment - self._began
        moment.synchronize()
        return self._began.elapsed_time(moment) / 1000


def write_timeline(timeline: Timeline, trainer: Trainer, step: int, attempt: int) -> None:
    """Append a step of the first pipeline to the run's file; every rank calls it.

    Args:
        timeline: of this rank.
        trainer: of this rank.
        step: 1 for the first.
        attempt: which start of the run.

    """
    groups = trainer.groups
    if any(axis.rank for axis in (groups.tensor, groups.context, groups.data)):
        return
    pipeline = groups.pipeline
    spans: list[Any] = [None] * pipeline.size
    dist.all_gather_object(spans, timeline.spans(), group=pipeline.group)
    if pipeline.rank == 0:
        lines = [
            json.dumps({"step": step, "attempt": attempt, "pipeline": rank, **span}) + "\n"
            for rank, taken in enumerate(spans)
            for span in taken
        ]
        with (Path(trainer.config.run) / FILE).open("a") as file:
            file.writelines(lines)
