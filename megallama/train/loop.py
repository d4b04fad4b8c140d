"""The training loop of one rank."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megallama.config.describe import to_yaml
from megallama.data.batch import Batch, micro_batches
from megallama.data.sampler import Samples
from megallama.observe.device import reset_peak_memory
from megallama.observe.record import EvalRecord
from megallama.observe.sinks import Fanout, observers
from megallama.parallel.pipeline.runtime import unwatched
from megallama.train.environment import Place
from megallama.train.lock import lock_folder
from megallama.train.lr import learning_rate
from megallama.train.preflight import Prepared
from megallama.train.report import Reporter
from megallama.train.session import build_trainer, process_group, resume, save_checkpoint
from megallama.train.step import Trainer, evaluate, train_step
from megallama.train.timeline import Timeline, write_timeline


class Preempted(Exception):  # noqa: N818 - it says what happened
    """The run was asked to stop, and its state is saved."""

    exit_code = 4


def train(prepared: Prepared, place: Place) -> None:
    """Train from the newest checkpoint, or from the beginning, to the last step.

    Args:
        prepared: a checked run.
        place: of this process.

    Raises:
        Diverged: loss or grad norm is no longer a number.
        Preempted: SIGTERM or SIGINT came; a checkpoint was saved after the step then running.
        UserError: another process is training in the run folder.

    """
    config, dataset = prepared.config, prepared.dataset
    timeline_every = config.metrics.timeline_every
    if place.rank == 0:
        lock_folder(Path(config.run))
    stop = _note_stop_signals()
    with process_group(place) as device:
        trainer = build_trainer(config, device)
        first, remarks = resume(trainer)
        if place.rank == 0:
            (Path(config.run) / "config.yaml").write_text(to_yaml(config))
        sinks = observers(config.metrics, Path(config.run), first > 0) if place.rank == 0 else []
        watch = Fanout(sinks)
        reporter = Reporter(trainer, dataset, resumed_step=first)
        watch.start(reporter.run_info())
        for remark in remarks:
            watch.message(f"passed over a checkpoint: {remark}")

        for step in range(first, config.train.steps):
            reset_peak_memory(device)
            began = time.perf_counter()
            batches = read_step(trainer, dataset.train, step)
            data_wait_s = time.perf_counter() - began
            lr = learning_rate(config.lr_schedule, config.optimizer.lr, config.train.steps, step)
            timeline = Timeline(trainer) if _due(step + 1, timeline_every, False) else None
            watch_action = timeline.watch if timeline else unwatched
            result = train_step(trainer, batches, lr, stop=stop, watch=watch_action)
            watch.step(reporter.step(step, result, lr, time.perf_counter() - began, data_wait_s))
            done = step + 1
            if timeline:
                write_timeline(timeline, trainer, done, reporter.attempt)
            finished = done == config.train.steps
            evaluating = _due(done, config.evaluation.every, finished) and not result.stop_requested
            if dataset.held_out and evaluating:
                watch.evaluation(_evaluate(trainer, dataset.held_out, reporter, done))
            if finished or result.stop_requested or _due(done, config.checkpoint.every, False):
                watch.message(f"saved {save_checkpoint(trainer, dataset, done)}")
            if result.stop_requested and not finished:
                watch.close(False)
                raise Preempted(f"asked to stop; step {done} is saved and the run can go on")
        watch.close(True)


def read_step(trainer: Trainer, samples: Samples, step: int) -> list[Batch]:
    """The micro-batches that this rank reads in a step."""
    config, data = trainer.config, trainer.groups.data
    return micro_batches(
        samples,
        step,
        global_samples=config.train.global_batch_tokens // config.data.seq_len,
        micro_batch=config.layout.micro_batch,
        dp_rank=data.rank,
        dp_size=data.size,
    )


def _evaluate(trainer: Trainer, held_out: Samples, reporter: Reporter, done: int) -> EvalRecord:
    began = time.perf_counter()
    batches = range(trainer.config.evaluation.batches)
    loss, tokens = evaluate(trainer, [read_step(trainer, held_out, n) for n in batches])
    return reporter.evaluation(done, loss, tokens, time.perf_counter() - began)


def _due(done: int, every: int, finished: bool) -> bool:
    return every > 0 and (done % every == 0 or finished)


def _note_stop_signals() -> Callable[[], bool]:
    """From here on SIGTERM or Ctrl-C asks for a checkpoint and an end; a second one kills."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return lambda: bool(asked)
