"""When forwards and backwards ran: what the schedule says, in its order; no number changes."""

import json
from pathlib import Path

from megallama.config.load import load_config
from megallama.config.rules import resolve_world
from megallama.parallel.pipeline.simulate import COMPUTATIONS
from megallama.parallel.pipeline.stages import micro_batches_of_step, program
from tests.train.runs import curve, train

INTERLEAVED = (
    "layout.pipeline=2",
    "layout.schedule=interleaved_1f1b",
    "layout.virtual_stages=2",
    "model.layers=4",
)


def test_executed_order_is_the_schedules(tmp_path: Path):
    assert train(tmp_path / "a" / "run", *INTERLEAVED, "metrics.timeline_every=3") == 0
    file = tmp_path / "a" / "run" / "timeline.jsonl"
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    assert {span["step"] for span in spans} == {3, 6}
    config = resolve_world(load_config(str(tmp_path / "a" / "run" / "config.yaml")), 2)
    for step in (3, 6):
        for rank in (0, 1):
            mine = [s for s in spans if (s["step"], s["pipeline"]) == (step, rank)]
            executed = [(s["kind"], s["stage"], s["micro_batch"]) for s in mine]
            planned = program(config, rank, micro_batches_of_step(config))
            assert executed == [tuple(a) for a in planned if a.kind in COMPUTATIONS]
            moments = [t for s in mine for t in (s["start_s"], s["stop_s"])]
            assert moments == sorted(moments)
            assert moments[0] >= 0

    assert train(tmp_path / "b" / "run", *INTERLEAVED) == 0
    assert not (tmp_path / "b" / "run" / "timeline.jsonl").exists()
    assert curve(tmp_path / "a" / "run") == curve(tmp_path / "b" / "run")


def test_only_the_first_pipeline_is_timed(tmp_path: Path):
    layout = ("layout.data_shard=2", "layout.tensor=2", "metrics.timeline_every=6")
    assert train(tmp_path / "run", *layout) == 0
    spans = [json.loads(line) for line in (tmp_path / "run" / "timeline.jsonl").open()]
    assert [s["kind"] for s in spans] == ["forward", "backward"] * (len(spans) // 2)
    assert [s["micro_batch"] for s in spans[::2]] == list(range(len(spans) // 2))
