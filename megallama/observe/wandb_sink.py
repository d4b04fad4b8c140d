"""Weights & Biases, which never asks anything, never ends a run and never holds the only copy.

Everything wandb writes lies under the run folder. A run logged offline is uploaded later with
`wandb sync RUN/wandb/offline-run-*`; starts of one run share an id, and sync puts them in order.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from megallama.config.schema import WandbConfig
from megallama.observe.record import EvalRecord, RunInfo, StepRecord
from megallama.observe.wandb_mode import choose_mode

STEP_METRICS: dict[str, Callable[[StepRecord], float | None]] = {
    "train/step": lambda r: r.step,
    "train/attempt": lambda r: r.attempt,
    "train/loss": lambda r: r.loss,
    "train/bits_per_byte": lambda r: r.bits_per_byte,
    "train/lr": lambda r: r.lr,
    "train/grad_norm": lambda r: r.grad_norm,
    "train/tokens": lambda r: r.tokens,
    "train/valid_tokens_frac": lambda r: r.valid_tokens / r.batch_tokens,
    "perf/step_time_s": lambda r: r.step_time_s,
    "perf/data_wait_frac": lambda r: r.data_wait_s / r.step_time_s,
    "perf/tokens_per_s": lambda r: r.tokens_per_s,
    "perf/tokens_per_s_per_gpu": lambda r: r.tokens_per_s_per_device,
    "perf/tflops_per_gpu": lambda r: r.tflops_per_device,
    "perf/mfu": lambda r: r.mfu,
    "perf/mfu_palm": lambda r: r.mfu_palm,
    "memory/peak_gib": lambda r: r.memory_gib,
}
EVAL_METRICS: dict[str, Callable[[EvalRecord], float | None]] = {
    "train/step": lambda r: r.step,
    "eval/loss": lambda r: r.loss,
    "eval/bits_per_byte": lambda r: r.bits_per_byte,
    "eval/tokens": lambda r: r.tokens,
    "eval/seconds": lambda r: r.seconds,
}
SUMMARIES: dict[str, Literal["max", "min"]] = {
    "perf/mfu": "max",
    "perf/mfu_palm": "max",
    "eval/loss": "min",
}


class WandbSink:
    """Logs to one W&B run; at the first failure it says so once and stays off."""

    def __init__(
        self,
        wandb: ModuleType,
        config: WandbConfig,
        run_folder: Path,
        resumed: bool,
        say: Callable[[str], None],
    ) -> None:
        self._wandb = wandb
        self._config = config
        self._folder = run_folder
        self._resumed = resumed
        self._say = say
        self._run: Any = None

    def start(self, info: RunInfo) -> None:
        """Open the run: online with an API key, else offline."""
        self._guarded(lambda: self._open(info))

    def step(self, record: StepRecord) -> None:
        """Log a step."""
        if self._run is not None:
            self._guarded(lambda: self._run.log(metrics(STEP_METRICS, record)))

    def evaluation(self, record: EvalRecord) -> None:
        """Log an evaluation."""
        if self._run is not None:
            self._guarded(lambda: self._run.log(metrics(EVAL_METRICS, record)))

    def message(self, text: str) -> None:
        """Messages are for people: nothing to do."""

    def close(self, ok: bool) -> None:
        """Finish the run, waiting at most a minute for an upload."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=0 if ok else 1))
            self._run = None

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # wandb raises anything from its own errors to BrokenPipeError
            self._run = None
            self._say(f"wandb is off from here on: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):  # else its exit hook prints a traceback
                self._wandb.teardown()

    def _open(self, info: RunInfo) -> None:
        os.environ.setdefault("WANDB_CACHE_DIR", str(self._folder.resolve() / "wandb" / "cache"))
        # A silent wandb cannot prompt, whatever it finds missing.
        defaults = self._wandb.setup(self._wandb.Settings(silent=True)).settings
        mode = choose_mode(self._config, defaults)
        if mode == "disabled":
            return
        reason = "no API key (`wandb login`)"
        if mode == "online":
            try:
                self._run = self._init("online", info)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self._wandb.teardown()
        if self._run is None:
            self._run = self._init("offline", info)
            because = f": {reason}" if "online" in (mode, self._config.mode) else ""
            self._say(
                f"wandb logs offline{because}; upload: wandb sync {self._run.settings.sync_dir}"
            )
        else:
            self._say(f"wandb: {self._run.url}")
        self._run.define_metric("*", step_metric="train/step")
        for name, summary in SUMMARIES.items():
            self._run.define_metric(name, step_metric="train/step", summary=summary)

    def _init(self, mode: str, info: RunInfo) -> Any:
        limits = {"init_timeout": 20, "finish_timeout": 60}
        known = self._wandb.Settings.model_fields
        return self._wandb.init(
            mode=mode,
            project=self._config.project,
            name=self._config.name or self._folder.resolve().name,
            id=run_id(self._folder, self._resumed),
            resume="allow",
            dir=self._folder,
            config=info.config
            | {
                "run_info": {
                    "model": info.model,
                    "parameters": info.parameters,
                    "layout": info.layout,
                    "world_size": info.world_size,
                    "device": info.device,
                    "data": info.data,
                }
            },
            settings=self._wandb.Settings(
                silent=True,
                console="off",  # it would wrap stdout, which the progress bar does already
                **{name: value for name, value in limits.items() if name in known},
            ),
        )


def run_id(run_folder: Path, resumed: bool) -> str:
    """The W&B run of this run folder, kept in RUN/wandb_id; a start from step 1 opens a new one.

    Its random part keeps equally named folders of a team apart.
    """
    path = run_folder / "wandb_id"
    if resumed and path.exists():
        return path.read_text().strip()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_folder.resolve().name)[:64]
    chosen = f"{name}-{secrets.token_hex(4)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chosen + "\n")
    return chosen


def metrics(names: dict[str, Callable[[Any], float | None]], record: Any) -> dict[str, float]:
    """W&B's names and values; what is unknown is left out."""
    values = {name: value(record) for name, value in names.items()}
    return {name: value for name, value in values.items() if value is not None}
