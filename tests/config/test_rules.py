"""Fields that are each valid and do not fit together."""

import pytest

from megallama.config.errors import UserError
from megallama.config.load import load_text
from megallama.config.rules import RULES, rules
from tests.config.sample import HERE, RUN, Case, assert_named, changed, refusal

CASES = [
    Case(
        "kv_heads: 2",
        "kv_heads: @@3",
        "model.kv_heads",
        "3 does not divide model.heads = 4: use 1, 2 or 4",
        fix="model.kv_heads=4",
    ),
    Case(
        "head_dim: 16",
        "head_dim: @@15",
        "model.head_dim",
        "15 is odd, and rotary embedding turns pairs of features: use 14 or 16",
        fix="model.head_dim=14",
    ),
    Case(
        "tensor: 1",
        "tensor: @@3",
        "layout.tensor",
        "3 does not divide model.heads = 4; "
        "neither divides model.kv_heads = 2 nor is its multiple; "
        "does not divide model.ffn = 128; "
        "does not divide the 512 rows of the vocabulary (model.vocab, padded): use 1, 2 or 4",
        fix="layout.tensor=4",
    ),
    Case(
        "steps: 100",
        "steps: 100, activation_checkpointing: @@elementwise",
        "train.activation_checkpointing",
        "elementwise is for blocks that are not compiled; with train.compile the compiler "
        "recomputes such results by itself: use none",
        fix="train.compile=false",
        given="train.compile=true",
    ),
    Case(
        "lr: 3e-3",
        "lr: 3e-3, master: @@split",
        "optimizer.master",
        "split halves float32 into bf16 weights, and train.precision = fp32: use fp32, or "
        "train.precision=bf16",
        fix="train.precision=bf16",
        given="train.precision=fp32",
    ),
    Case(
        "tensor: 1,",
        "tensor: 1, reshard_after_forward: @@true,",
        "layout.reshard_after_forward",
        "true reduces gradients in every micro-batch, and split masters add those up in bf16: "
        "leave it out, or use master: fp32",
        fix="layout.reshard_after_forward=false",
        given="optimizer.master=split train.precision=bf16",
    ),
    Case(
        "run: runs/test",
        "run: runs/test\nkernels: {adamw: @@apex}",
        "kernels.adamw",
        "apex updates whole masters, and optimizer.master = split: leave it out",
        fix="kernels.adamw=auto",
        given="optimizer.master=split train.precision=bf16",
    ),
    Case(
        "run: runs/test",
        "run: runs/test\nkernels: {attention: @@varlen}",
        "kernels.attention",
        "varlen computes in bf16, and train.precision = fp32: use auto",
        fix="kernels.attention=auto",
        given="train.precision=fp32",
    ),
    Case(
        "run: runs/test",
        "run: runs/test\nkernels: {attention: @@varlen}",
        "kernels.attention",
        "varlen sees all keys at once, and layout.context_method = ring passes them around: "
        "use auto",
        fix="kernels.attention=auto",
        given="layout.context=2 layout.context_method=ring",
    ),
    Case(
        "tensor: 1",
        "tensor: @@8",
        "layout.tensor",
        "8 does not divide model.heads = 4: use 1, 2 or 4",
        fix="layout.tensor=2",
    ),
    Case(
        "tensor: 1",
        "tensor: @@4",
        "layout.tensor",
        "4 neither divides model.kv_heads = 6 nor is its multiple: use 1, 2, 3 or 6",
        fix="layout.tensor=6",
        given="model.heads=12 model.kv_heads=6 model.ffn=384 model.vocab=384",
    ),
    Case(
        "tensor: 1",
        "tensor: @@4",
        "layout.tensor",
        "4 does not divide model.ffn = 126: use 1 or 2",
        fix="layout.tensor=2",
        given="model.ffn=126",
    ),
    Case(
        "tensor: 1",
        "tensor: @@6",
        "layout.tensor",
        "6 does not divide the 512 rows of the vocabulary (model.vocab, padded): use 1 or 2",
        fix="layout.tensor=2",
        given="model.heads=6 model.ffn=126 model.vocab=500",
    ),
    Case(
        "pipeline: 1",
        "pipeline: @@5",
        "layout.pipeline",
        "5 ranks are more than model.layers = 4: use 4 or fewer",
        fix="layout.pipeline=4",
    ),
    Case(
        "data_shard: 1",
        "virtual_stages: @@4",
        "layout.virtual_stages",
        "layout.pipeline 2 × layout.virtual_stages 4 = 8 stages are more than model.layers = 4: "
        "use 3 or fewer",
        fix="layout.virtual_stages=2",
        given="layout.pipeline=2 layout.schedule=interleaved_1f1b",
    ),
    Case(
        "data_shard: 1",
        "virtual_stages: @@2",
        "layout.virtual_stages",
        "2 stages a rank need layout.schedule: interleaved_1f1b, which is 1f1b: "
        "change the schedule, or use 1",
        fix="layout.schedule=interleaved_1f1b",
        given="layout.pipeline=2",
    ),
    Case(
        "data_shard: 1",
        "schedule: @@interleaved_1f1b",
        "layout.schedule",
        "needs layout.virtual_stages of 2 or more, which is 1: use 1f1b, or 2 virtual stages",
        fix="layout.virtual_stages=2",
        given="layout.pipeline=2",
    ),
    Case(
        "seq_len: 192",
        "seq_len: @@100",
        "data.seq_len",
        "100 × layout.micro_batch 1 = 100 tokens cannot be cut into 2 × layout.context 4 "
        "equal parts: use 96 or 104",
        fix="data.seq_len=96",
        given="layout.context=4 train.global_batch_tokens=62400",
    ),
    Case(
        "seq_len: 192",
        "seq_len: @@30",
        "data.seq_len",
        "30 × layout.micro_batch 1 = 30 tokens cannot be cut into 2 × layout.context 3 and "
        "layout.context 3 × layout.tensor 4 equal parts: use 24 or 36",
        fix="data.seq_len=36",
        given="layout.context=3 layout.tensor=4 train.global_batch_tokens=3600",
    ),
    Case(
        "seq_len: 192",
        "seq_len: @@15",
        "data.seq_len",
        "15 × layout.micro_batch 2 = 30 tokens cannot be cut into layout.context 1 × "
        "layout.tensor 4 equal parts: use 14 or 16",
        fix="data.seq_len=16",
        given="layout.tensor=4 layout.micro_batch=2 train.global_batch_tokens=960",
    ),
    Case(
        "tokens: 1536",
        "tokens: @@1500",
        "train.global_batch_tokens",
        "1500 is not a multiple of data.seq_len 192: use 1344 or 1536",
        fix="train.global_batch_tokens=1344",
    ),
    Case(
        "tokens: 1536",
        "tokens: @@1536",
        "train.global_batch_tokens",
        "1536 is not a multiple of data.seq_len 192 × layout.micro_batch 2 × "
        "layout.data_replicate 2 × layout.data_shard 4 = 3072: use 3072",
        fix="train.global_batch_tokens=3072",
        given="layout.data_shard=4 layout.data_replicate=2 layout.micro_batch=2",
    ),
    Case(
        "tokens: 1536",
        "tokens: @@960",
        "train.global_batch_tokens",
        "960 is not a multiple of data.seq_len 192 × layout.data_replicate 2 = 384: "
        "use 768 or 1152",
        fix="train.global_batch_tokens=768",
        given="layout.data_shard=-1 layout.data_replicate=2",
    ),
    Case(
        "warmup_steps: 10",
        "warmup_steps: @@101",
        "lr_schedule.warmup_steps",
        "101 is more than train.steps = 100: use 100 or fewer",
        fix="lr_schedule.warmup_steps=100",
    ),
    Case(
        "min_lr: 3e-4",
        "decay_steps: @@9",
        "lr_schedule.decay_steps",
        "9 is for lr_schedule.decay: wsd, and decay is cosine: remove it, or use decay: wsd",
        fix="lr_schedule.decay=wsd",
    ),
    Case(
        "min_lr: 3e-4",
        "decay_steps: @@91",
        "lr_schedule.decay_steps",
        "91 is more than the 90 steps left: train.steps 100 - lr_schedule.warmup_steps 10: "
        "use 90 or fewer",
        fix="lr_schedule.decay_steps=90",
        given="lr_schedule.decay=wsd",
    ),
    Case(
        "lr_schedule: {warmup_steps: 10",
        "@@lr_schedule: {decay: wsd, warmup_steps: 95",
        "lr_schedule.decay_steps",
        "10 (a tenth of the run) is more than the 5 steps left",
        fix="lr_schedule.decay_steps=5",
    ),
    Case(
        "min_lr: 3e-4",
        "min_lr: @@0.3",
        "lr_schedule.min_lr",
        "0.3 is above the peak, optimizer.lr = 0.003: use 0.0003, a tenth of it, or 0",
        fix="lr_schedule.min_lr=0.0003",
    ),
    Case(
        "data_shard: 1",
        "data_shard: @@0",
        "layout.data_shard",
        "0 ranks hold no model: use 1, or -1 for what is left of the world",
        fix="layout.data_shard=-1",
    ),
    Case(
        "pipeline: 1",
        "schedule: @@interleaved_1f1b",
        "layout.schedule",
        "interleaved_1f1b needs layout.pipeline of 2 or more, which is 1: "
        "use 1f1b with virtual_stages: 1, or 2 pipeline ranks",
        fix="layout.pipeline=2",
        given="layout.virtual_stages=2",
    ),
    Case(
        "pipeline: 1",
        "stage_layers: @@[2, 2], pipeline: 1",
        "layout.stage_layers",
        "2 numbers for layout.pipeline 1 × layout.virtual_stages 1 = 1 stages: "
        "give one for each stage, or leave it out",
        fix="layout.pipeline=2",
    ),
    Case(
        "pipeline: 1",
        "stage_layers: @@[1, 2], pipeline: 2",
        "layout.stage_layers",
        "[1, 2] adds up to 3, and model.layers is 4: change a stage by +1, or leave it out",
        fix="layout.stage_layers=[2, 2]",
    ),
    Case(
        "pipeline: 1",
        "stage_layers: @@[2, 0, 2], pipeline: 3",
        "layout.stage_layers",
        "[2, 0, 2] leaves a stage in the middle without a layer",
        fix="layout.stage_layers=[2, 1, 1]",
    ),
    Case(
        "context: 1",
        "context_method: ulysses, context: @@3",
        "layout.context",
        "3 ranks cannot exchange tokens for the 4 query and 2 key/value heads that a tensor rank "
        "has: use 1, 2 or 4, or context_method: all_gather",
        fix="layout.context=4",
        given="data.seq_len=96 train.global_batch_tokens=960",
    ),
    Case(
        "context: 1",
        "context_method: ulysses, context: 2, context_balance: @@per_document",
        "layout.context_balance",
        "per_document is for all_gather and ring",
        fix="layout.context_balance=head_tail",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says[:60])
def test_message_names_key_place_value_and_way_out(case: Case) -> None:
    assert_named(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says[:60])
def test_nothing_else_is_blamed_and_the_way_out_works(case: Case) -> None:
    text = changed(case.old, case.new).replace(HERE, "")
    assert len(refusal(text, *case.given.split()).problems) == 1
    load_text(text, [*case.given.split(), case.fix])


def test_every_rule_has_a_case() -> None:
    """Each rule alone finds something in the cases, so that none can be lost unseen."""
    silent = []
    for rule in RULES:
        found = False
        for case in CASES:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("megallama.config.rules.RULES", (rule,))
                try:
                    load_text(changed(case.old, case.new).replace(HERE, ""), case.given.split())
                except UserError:
                    found = True
        silent += [] if found else [rule.__name__]
    assert not silent


@pytest.mark.parametrize("heads", range(1, 33))
def test_query_heads_of_a_rank_share_kv_heads(heads: int) -> None:
    """Any accepted tensor size above kv_heads leaves each rank with heads of one group."""
    for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
        for tensor in (n for n in range(1, heads + 1) if heads % n == 0):
            if kv_heads % tensor and tensor % kv_heads:
                continue
            each, group = heads // tensor, heads // kv_heads
            for rank in range(tensor):
                groups = {head // group for head in range(rank * each, (rank + 1) * each)}
                assert len(groups) == max(1, kv_heads // tensor)


def test_a_valid_run_has_no_problems() -> None:
    assert list(rules(load_text(RUN))) == []
