"""A fault in a production line must not pass: otherwise a green check means nothing."""

from __future__ import annotations

import pytest

from megallama.verify.run import VerificationFailed, verify

FAULTS = {
    "clones_across_tensor_ranks": {"tensor": 2},
    "norm_weights_not_reduced": {"tensor": 2},
    "mean_of_means": {"data_shard": 2},
    "mean_of_micro_batch_means": {"pipeline": 2},
    "gradient_scaled_by_data_parallel_size": {"data_shard": 2},
    "stage_skips_a_layer": {"pipeline": 2},
    "step_before_the_last_micro_batch": {"data_shard": 2},
    "replicated_kv_heads_not_summed": {"tensor": 4},
    "norm_counted_on_every_tensor_rank": {"tensor": 2},
    "labels_of_padding_counted": {"tensor": 2},
    "context_gradients_not_summed": {"context": 2},
    "chunks_in_the_wrong_order": {"context": 2},
    "positions_restart_in_each_chunk": {"context": 2},
    "document_leaks_over_a_border": {"context": 2},
    "ring_block_attributed_to_the_wrong_rank": {"context": 2, "context_method": "ring"},
    "head_copies_in_another_order": {"context": 4, "context_method": "ulysses"},
    "swapped_messages": {"pipeline": 2},
    "tied_copies_not_summed": {"pipeline": 2},
}
SHAPES = {
    "replicated_kv_heads_not_summed": {"kv_heads": 2},
    "labels_of_padding_counted": {"vocab": 500},
    "head_copies_in_another_order": {"kv_heads": 2},
    "tied_copies_not_summed": {"tie_embeddings": True},
}


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_is_caught(fault, dtype, config_for, monkeypatch):
    monkeypatch.setenv("PLANTED_FAULT", fault)
    config = config_for(model=SHAPES.get(fault), layout=FAULTS[fault])
    target = "tests.verify.faults:run_from_environment"
    try:
        report = verify(config, dtype=dtype, steps=3, max_processes=8, layout_target=target)
    except VerificationFailed:
        pytest.fail("the fault broke the run instead of its numbers")
    assert not report.passed


def test_nothing_planted_passes(config_for):
    config = config_for(layout={"tensor": 2, "pipeline": 2})
    assert verify(config, dtype="float64", steps=3, max_processes=8).passed
