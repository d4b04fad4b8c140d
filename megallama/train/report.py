"""Turns what a step returned into what observers are told."""

import time
from pathlib import Path

from megallama.config.schema import parameter_count
from megallama.data.dataset import Dataset
from megallama.observe.device import device_name, peak_memory_gib
from megallama.observe.jsonl import read_metrics
from megallama.observe.meter import Meter, bits_per_byte
from megallama.observe.mfu import peak_flops
from megallama.observe.record import EvalRecord, RunInfo, StepRecord
from megallama.train.backend import kernels_text
from megallama.train.step import StepResult, Trainer


class Reporter:
    """Makes the records of one start of a run."""

    def __init__(self, trainer: Trainer, dataset: Dataset, resumed_step: int) -> None:
        config = trainer.config
        self._config, self._dataset, self._resumed_step = config, dataset, resumed_step
        self._device = trainer.stages.device
        self._world_size = trainer.groups.mesh.size()
        self._name = device_name(self._device)
        self.attempt = _attempts(Path(config.run) / "metrics.jsonl") + 1
        self._meter = Meter(
            model=config.model,
            seq_len=config.data.seq_len,
            devices=self._world_size,
            peak_flops=peak_flops(self._name, config.train.precision),
        )

    def run_info(self) -> RunInfo:
        """What is known before the first step."""
        config = self._config
        count = parameter_count(config.model)
        return RunInfo(
            run_folder=config.run,
            config=config.model_dump(),
            model=f"Llama, {config.model.layers} layers of {config.model.hidden}",
            parameters=count,
            layout=_layout_text(config.layout.model_dump()),
            world_size=self._world_size,
            device=self._name,
            data=self._dataset.summary,
            kernels=kernels_text(config, self._device),
            resumed_step=self._resumed_step,
            peak_flops=self._meter.peak_flops,
        )

    def step(
        self, step: int, result: StepResult, lr: float, step_time_s: float, data_wait_s: float
    ) -> StepRecord:
        """The record of step `step`, 0 for the first."""
        train = self._config.train
        rates = self._meter.rates(step_time_s, train.global_batch_tokens, result.attended_pairs)
        return StepRecord(
            step=step + 1,
            steps=train.steps,
            attempt=self.attempt,
            loss=result.loss,
            bits_per_byte=bits_per_byte(result.loss, self._dataset.bytes_per_token),
            lr=lr,
            grad_norm=result.grad_norm,
            tokens=(step + 1) * train.global_batch_tokens,
            batch_tokens=train.global_batch_tokens,
            valid_tokens=result.valid_tokens,
            step_time_s=step_time_s,
            data_wait_s=data_wait_s,
            **rates._asdict(),
            memory_gib=peak_memory_gib(self._device),
            timestamp=time.time(),
        )

    def evaluation(self, done: int, loss: float, tokens: int, seconds: float) -> EvalRecord:
        """The record of an evaluation after `done` steps."""
        bytes_per_token = self._dataset.held_out_bytes_per_token
        return EvalRecord(done, loss, bits_per_byte(loss, bytes_per_token), tokens, seconds)


def _attempts(metrics: Path) -> int:
    """Starts of the run that got as far as a step."""
    if not metrics.exists():
        return 0
    return max((line.get("attempt", 0) for line in read_metrics(metrics)), default=0)


def _layout_text(layout: dict[str, int]) -> str:
    short = {
        "tensor": "TP",
        "context": "CP",
        "pipeline": "PP",
        "data_shard": "FSDP",
        "data_replicate": "DP",
    }
    named = [f"{short[axis]}{layout[axis]}" for axis in short if layout[axis] > 1]
    return " · ".join(named) or "one process"
