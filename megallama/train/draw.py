"""A pipeline's step as a picture: planned from a config, or as a run measured it."""

from pathlib import Path

from megallama.config.errors import UserError
from megallama.config.rules import required_processes, resolve_world
from megallama.config.schema import Config, LayoutConfig
from megallama.observe.picture import Computation, pipeline_svg
from megallama.observe.timeline_reader import read_timeline
from megallama.parallel.pipeline.schedule import Action, Kind, group_sizes
from megallama.parallel.pipeline.simulate import simulate
from megallama.parallel.pipeline.stages import (
    costs_of_ends,
    layers_of_stages,
    micro_batches_of_step,
    program,
)

WORK = {Kind.FORWARD: 1, Kind.BACKWARD: 2}
MOST_BOXES = 20_000
"""Some 3 MB of SVG, and boxes of less than a pixel."""


def draw_planned(config: Config, name: str) -> str:
    """The step that a config's layout plans, as an SVG.

    A forward takes as long as its stage has layers, the embedding and the head counted as
    `end_costs` says, and a backward twice as long; messages take no time. `data_shard: -1` counts
    as 1, as alone on a machine without GPUs.

    Args:
        config: of the run.
        name: for the title.

    Raises:
        UserError: the batch does not fit the data ranks, or has too many micro-batches to be seen.

    """
    config = resolve_world(config, required_processes(config, 0))
    layout = config.layout
    micro_batches = micro_batches_of_step(config)
    stages = layout.pipeline * layout.virtual_stages
    if (boxes := 2 * stages * micro_batches) > MOST_BOXES:
        most = MOST_BOXES // (2 * stages)
        raise UserError.one(
            "train.global_batch_tokens",
            f"{micro_batches} micro-batches on each data rank are {boxes} boxes to draw, and "
            f"{MOST_BOXES} can be seen: draw {most} micro-batches or fewer, with more data ranks "
            "(layout.data_shard) or "
            f"train.global_batch_tokens={config.train.global_batch_tokens // micro_batches * most}",
        )
    programs = [program(config, rank, micro_batches) for rank in range(layout.pipeline)]
    costs = _stage_costs(config)

    def cost(action: Action) -> float:
        return costs[action.stage] * WORK[action.kind]

    rows = [
        [Computation(str(a.kind), a.stage, a.micro_batch, start, stop) for a, start, stop in spans]
        for spans in simulate(programs, cost)
    ]
    return pipeline_svg(rows, _title(name, layout, micro_batches), "forwards of a layer")


def _title(name: str, layout: LayoutConfig, micro_batches: int) -> str:
    ranks, groups = f"pipeline {layout.pipeline}", ""
    if layout.virtual_stages > 1:
        ranks += f" × {layout.virtual_stages} virtual stages"
        group, *_ = group_sizes(micro_batches, layout.pipeline, layout.micro_batch_group)
        groups = f" in groups of {group}"
    return f"{name}: {layout.schedule}, {ranks}, micro-batches {micro_batches}{groups}"


def _stage_costs(config: Config) -> list[float]:
    costs = [float(len(layers)) for layers in layers_of_stages(config)]
    embedding, head = costs_of_ends(config)
    costs[0] += embedding
    costs[-1] += head
    return costs


def draw_measured(run: Path, step: int | None) -> str:
    """A step that a run measured, the last by default, as an SVG.

    Raises:
        UserError: the run folder has no such step, or no timeline.

    """
    step, rows = read_timeline(run, step)
    last = max(box.stop for row in rows for box in row)
    factor, unit = (1, "s") if last >= 1 else (1000, "ms")
    rows = [
        [box._replace(start=box.start * factor, stop=box.stop * factor) for box in row]
        for row in rows
    ]
    return pipeline_svg(rows, f"{run.resolve().name}, step {step} as measured", unit)
