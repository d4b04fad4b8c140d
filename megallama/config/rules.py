"""Rules that look at more than one field, and the layout's fit to a world size.

Each rule yields one Problem for what it finds, with the value and one that works. A rule that asks
for a field which could not be read raises Unreadable and is passed over; all others still run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from megallama.config.errors import Problem, UserError
from megallama.config.schema import Config, LayoutConfig, ModelConfig, vocab_rows
from megallama.config.suggest import either, near_divisors, near_multiples


class Unreadable(Exception):  # noqa: N818 - a signal between rules, not an error
    """A rule asked for a field whose value is missing or wrong."""


def rules(config: Config) -> Iterator[Problem]:
    """Every problem between fields of a config whose single fields are valid."""
    for rule in RULES:
        try:
            yield from rule(config)
        except Unreadable:
            continue


def _heads_share_kv_heads(config: Config) -> Iterator[Problem]:
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if heads % kv_heads:
        choices = either(near_divisors(heads, kv_heads))
        yield Problem(
            "model.kv_heads", f"{kv_heads} does not divide model.heads = {heads}: use {choices}"
        )


def _head_dim_is_even(config: Config) -> Iterator[Problem]:
    size = config.model.head_dim
    if size % 2:
        what = f"{size} is odd, and rotary embedding turns pairs of features"
        yield Problem("model.head_dim", f"{what}: use {either(near_multiples(size, 2))}")


def _split_masters_are_of_bf16(config: Config) -> Iterator[Problem]:
    precision = config.train.precision
    if config.optimizer.master == "split" and precision != "bf16":
        what = f"split halves float32 into bf16 weights, and train.precision = {precision}"
        yield Problem("optimizer.master", f"{what}: use fp32, or train.precision=bf16")


def _split_masters_add_up_in_float32(config: Config) -> Iterator[Problem]:
    if config.optimizer.master == "split" and config.layout.reshard_after_forward:
        what = "true reduces gradients in every micro-batch, and split masters add those up in bf16"
        yield Problem("layout.reshard_after_forward", f"{what}: leave it out, or use master: fp32")


def _split_masters_have_their_own_update(config: Config) -> Iterator[Problem]:
    asked = config.kernels.adamw
    if config.optimizer.master == "split" and asked in ("torch", "apex"):
        what = f"{asked} updates whole masters, and optimizer.master = split"
        yield Problem("kernels.adamw", f"{what}: leave it out")


def _varlen_attention_fits(config: Config) -> Iterator[Problem]:
    asked = config.kernels.attention
    if asked not in ("varlen", "fa3"):
        return
    if config.train.precision != "bf16":
        what = f"{asked} computes in bf16, and train.precision = {config.train.precision}"
        yield Problem("kernels.attention", f"{what}: use auto")
    if config.layout.context > 1 and config.layout.context_method == "ring":
        what = f"{asked} sees all keys at once, and layout.context_method = ring passes them around"
        yield Problem("kernels.attention", f"{what}: use auto")


def _compiler_recomputes_by_itself(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.compile and train.activation_checkpointing == "elementwise":
        what = "elementwise is for blocks that are not compiled; with train.compile the compiler"
        yield Problem(
            "train.activation_checkpointing", f"{what} recomputes such results by itself: use none"
        )


def _cuts_query_heads(model: ModelConfig, tensor: int) -> str:
    return "" if model.heads % tensor == 0 else f"does not divide model.heads = {model.heads}"


def _cuts_kv_heads(model: ModelConfig, tensor: int) -> str:
    # Where `tensor` is a multiple of kv_heads and divides heads, the query heads of one rank lie
    # within one group: heads / tensor divides heads / kv_heads, and ranks start at its multiples.
    fits = model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
    return "" if fits else f"neither divides model.kv_heads = {model.kv_heads} nor is its multiple"


def _cuts_ffn(model: ModelConfig, tensor: int) -> str:
    return "" if model.ffn % tensor == 0 else f"does not divide model.ffn = {model.ffn}"


def _cuts_vocabulary(model: ModelConfig, tensor: int) -> str:
    rows = vocab_rows(model)
    why = f"does not divide the {rows} rows of the vocabulary (model.vocab, padded)"
    return "" if rows % tensor == 0 else why


TENSOR_CUTS = (_cuts_query_heads, _cuts_kv_heads, _cuts_ffn, _cuts_vocabulary)
LARGEST_TENSOR = 128  # ranks that a suggestion names; more heads than this are not cut one by one


def _tensor_cuts_the_model(config: Config) -> Iterator[Problem]:
    tensor = config.layout.tensor
    why = _tensor_complaints(config, tensor)
    if why:
        fits = [n for n in range(1, LARGEST_TENSOR + 1) if not _tensor_complaints(config, n)]
        choices = either(sorted(sorted(fits, key=lambda n: abs(n - tensor))[:4]))
        yield Problem("layout.tensor", f"{tensor} {'; '.join(why)}: use {choices}")


def _tensor_complaints(config: Config, tensor: int) -> list[str]:
    """Why the model cannot be cut over `tensor` ranks, from the fields that could be read."""
    found = (_known(cut, config.model, tensor) for cut in TENSOR_CUTS)
    return [why for why in found if why]


def _stages_have_layers(config: Config) -> Iterator[Problem]:
    layers, layout = config.model.layers, config.layout
    stages = layout.pipeline * layout.virtual_stages
    # Where a rank has several stages, the first and the last of all may have no layer: they have
    # the embedding and the head (Llama 3 405B: 126 layers, 128 stages).
    if layout.stage_layers is not None:
        return  # another rule looks at them
    spare = 2 if layout.virtual_stages > 1 else 0
    if stages <= layers + spare:
        return
    if layout.pipeline > layers:
        what = f"{layout.pipeline} ranks are more than model.layers = {layers}"
        yield Problem("layout.pipeline", f"{what}: use {_at_most(layers)}")
        return
    what = (
        f"layout.pipeline {layout.pipeline} × layout.virtual_stages {layout.virtual_stages} = "
        f"{stages} stages are more than model.layers = {layers}"
    )
    most = (layers + spare) // layout.pipeline
    choice = _at_most(most) if most > 1 else "1 with schedule: 1f1b"
    yield Problem("layout.virtual_stages", f"{what}: use {choice}")


def _at_most(count: int) -> str:
    return f"{count} or fewer" if count > 1 else str(count)


def _interleaving_has_virtual_stages(config: Config) -> Iterator[Problem]:
    schedule, virtual = config.layout.schedule, config.layout.virtual_stages
    if virtual > 1 and schedule != "interleaved_1f1b":
        yield Problem(
            "layout.virtual_stages",
            f"{virtual} stages a rank need layout.schedule: interleaved_1f1b, which is {schedule}: "
            "change the schedule, or use 1",
        )
    if virtual == 1 and schedule == "interleaved_1f1b":
        yield Problem(
            "layout.schedule",
            "interleaved_1f1b needs layout.virtual_stages of 2 or more, which is 1: "
            "use 1f1b, or 2 virtual stages",
        )


def _tokens_are_cut_evenly(config: Config) -> Iterator[Problem]:
    layout, seq_len = config.layout, config.data.seq_len
    context, tensor, micro_batch = layout.context, layout.tensor, layout.micro_batch
    # context: 2 chunks a rank, head and tail; tensor: sequence parallelism cuts each rank's tokens.
    unit = math.lcm(2 * context if context > 1 else 1, context * tensor)
    if (seq_len * micro_batch) % unit == 0:
        return
    cuts = ([f"2 × layout.context {context}"] if context > 1 else []) + (
        [f"layout.context {context} × layout.tensor {tensor}"] if tensor > 1 else []
    )
    choices = either(near_multiples(seq_len, unit // math.gcd(unit, micro_batch)))
    what = f"{seq_len} × layout.micro_batch {micro_batch} = {seq_len * micro_batch} tokens"
    yield Problem(
        "data.seq_len", f"{what} cannot be cut into {' and '.join(cuts)} equal parts: use {choices}"
    )


def _batch_fills_every_rank(config: Config) -> Iterator[Problem]:
    tokens, seq_len, layout = config.train.global_batch_tokens, config.data.seq_len, config.layout
    # data_shard -1 is not known yet; resolve_world asks again when it is.
    factors = {
        "data.seq_len": seq_len,
        "layout.micro_batch": _known(lambda: layout.micro_batch),
        "layout.data_replicate": _known(lambda: layout.data_replicate),
        "layout.data_shard": _known(lambda: max(1, layout.data_shard)),
    }
    sizes = {name: size or 1 for name, size in factors.items()}
    unit = math.prod(sizes.values())
    if tokens % unit == 0:
        return
    product = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    total = f" = {unit}" if unit != seq_len else ""
    what = f"{tokens} is not a multiple of {product}{total}"
    yield Problem(
        "train.global_batch_tokens", f"{what}: use {either(near_multiples(tokens, unit))}"
    )


def _warmup_fits_in_run(config: Config) -> Iterator[Problem]:
    warmup, steps = config.lr_schedule.warmup_steps, config.train.steps
    if warmup > steps:
        what = f"{warmup} is more than train.steps = {steps}"
        yield Problem("lr_schedule.warmup_steps", f"{what}: use {_at_most(steps)}")


def _decay_steps_need_wsd(config: Config) -> Iterator[Problem]:
    decay, steps = config.lr_schedule.decay, config.lr_schedule.decay_steps
    if steps is not None and decay != "wsd":
        what = f"{steps} is for lr_schedule.decay: wsd, and decay is {decay}"
        yield Problem("lr_schedule.decay_steps", f"{what}: remove it, or use decay: wsd")


def _decay_fits_after_warmup(config: Config) -> Iterator[Problem]:
    schedule, steps = config.lr_schedule, config.train.steps
    left = steps - schedule.warmup_steps
    wanted = schedule.decay_steps or steps // 10
    if schedule.decay == "wsd" and left >= 0 and wanted > left:
        what = (
            f"{wanted}{'' if schedule.decay_steps else ' (a tenth of the run)'} is more than the "
            f"{left} steps left: train.steps {steps} - lr_schedule.warmup_steps "
            f"{schedule.warmup_steps}"
        )
        advice = f"use {_at_most(left)}" if left else f"use warmup_steps {max(0, steps - wanted)}"
        yield Problem("lr_schedule.decay_steps", f"{what}: {advice}")


def _min_lr_is_below_peak(config: Config) -> Iterator[Problem]:
    lowest, peak = config.lr_schedule.min_lr, config.optimizer.lr
    if lowest > peak:
        what = f"{lowest:g} is above the peak, optimizer.lr = {peak:g}"
        yield Problem("lr_schedule.min_lr", f"{what}: use {peak / 10:g}, a tenth of it, or 0")


def _data_shard_is_not_zero(config: Config) -> Iterator[Problem]:
    if config.layout.data_shard == 0:
        yield Problem(
            "layout.data_shard", "0 ranks hold no model: use 1, or -1 for what is left of the world"
        )


def _interleaving_has_a_pipeline(config: Config) -> Iterator[Problem]:
    schedule, pipeline = config.layout.schedule, config.layout.pipeline
    if schedule == "interleaved_1f1b" and pipeline == 1:
        yield Problem(
            "layout.schedule",
            "interleaved_1f1b needs layout.pipeline of 2 or more, which is 1: "
            "use 1f1b with virtual_stages: 1, or 2 pipeline ranks",
        )


def _given_stages_hold_the_layers(config: Config) -> Iterator[Problem]:
    given, layers = config.layout.stage_layers, config.model.layers
    if given is None:
        return
    layout = config.layout
    stages = layout.pipeline * layout.virtual_stages
    if len(given) != stages:
        yield Problem(
            "layout.stage_layers",
            f"{len(given)} numbers for layout.pipeline {layout.pipeline} × layout.virtual_stages "
            f"{layout.virtual_stages} = {stages} stages: give one for each stage, or leave it out",
        )
    elif sum(given) != layers:
        yield Problem(
            "layout.stage_layers",
            f"{given} adds up to {sum(given)}, and model.layers is {layers}: change a stage by "
            f"{layers - sum(given):+d}, or leave it out",
        )
    elif 0 in given[1:-1] or given == [0]:
        yield Problem(
            "layout.stage_layers",
            f"{given} leaves a stage in the middle without a layer: only the first and the last "
            "may have 0, or leave it out",
        )


def _exchanged_heads_are_even(config: Config) -> Iterator[Problem]:
    layout, model = config.layout, config.model
    if layout.context_method != "ulysses" or layout.context == 1:
        return
    if model.heads % layout.tensor:
        return  # another rule says so
    heads, kv_heads = model.heads // layout.tensor, max(1, model.kv_heads // layout.tensor)
    fits = [n for n in range(1, heads + 1) if _exchanges(n, heads, kv_heads)]
    if layout.context not in fits:
        what = (
            f"{layout.context} ranks cannot exchange tokens for the {heads} query and {kv_heads} "
            "key/value heads that a tensor rank has"
        )
        nearest = sorted(sorted(fits, key=lambda n: abs(n - layout.context))[:3])
        yield Problem(
            "layout.context", f"{what}: use {either(nearest)}, or context_method: all_gather"
        )


def _exchanges(context: int, heads: int, kv_heads: int) -> bool:
    return heads % context == 0 and (kv_heads % context == 0 or context % kv_heads == 0)


def _exchange_needs_no_balance(config: Config) -> Iterator[Problem]:
    layout = config.layout
    if layout.context_method == "ulysses" and layout.context_balance != "head_tail":
        yield Problem(
            "layout.context_balance",
            f"{layout.context_balance} is for all_gather and ring: every rank attends to the whole "
            "stream under context_method: ulysses. Leave it out",
        )


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _compiler_recomputes_by_itself,
    _split_masters_are_of_bf16,
    _split_masters_add_up_in_float32,
    _split_masters_have_their_own_update,
    _varlen_attention_fits,
    _heads_share_kv_heads,
    _head_dim_is_even,
    _tensor_cuts_the_model,
    _stages_have_layers,
    _interleaving_has_virtual_stages,
    _tokens_are_cut_evenly,
    _batch_fills_every_rank,
    _warmup_fits_in_run,
    _decay_steps_need_wsd,
    _decay_fits_after_warmup,
    _min_lr_is_below_peak,
    _data_shard_is_not_zero,
    _interleaving_has_a_pipeline,
    _given_stages_hold_the_layers,
    _exchanged_heads_are_even,
    _exchange_needs_no_balance,
)


def _known(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What `ask` returns, or None where it needs a field that could not be read."""
    try:
        return ask(*arguments)
    except Unreadable:
        return None


def resolve_world(config: Config, world_size: int) -> Config:
    """The config with `data_shard` filled in, for `world_size` processes.

    Raises UserError where the layout's axes do not multiply to `world_size`, or where the batch
    cannot be dealt out evenly to the data ranks that result.
    """
    shard = config.layout.data_shard
    others = _other_ranks(config.layout)
    product = " × ".join(f"{name} {size}" for name, size in _axes(config.layout).items())
    if shard == -1 and (world_size < others or world_size % others):
        worlds = either(near_multiples(world_size, others))
        what = f"{product} = {others} ranks do not divide a world of {world_size} processes"
        raise UserError.one("layout", f"{what}: start {worlds}")
    if shard != -1 and others * shard != world_size:
        total = others * shard
        what = f"{product} × data_shard {shard} = {total} ranks, not {world_size} processes"
        fits = world_size >= others and world_size % others == 0
        other = f", or use data_shard {world_size // others}" if fits else ""
        raise UserError.one("layout", f"{what}: start {total}{other}")
    layout = config.layout.model_copy(update={"data_shard": world_size // others})
    resolved = config.model_copy(update={"layout": layout})
    problems = list(rules(resolved))
    if problems:
        raise UserError(problems, f"{world_size} processes")
    return resolved


def required_processes(config: Config, devices: int) -> int:
    """World size for a start on this machine alone; `devices` is its number of GPUs.

    `data_shard: -1` takes the GPUs that the other axes leave, and 1 without GPUs.
    """
    others = _other_ranks(config.layout)
    shard = config.layout.data_shard
    return others * (max(1, devices // others) if shard == -1 else shard)


def _axes(layout: LayoutConfig) -> dict[str, int]:
    names = ("tensor", "context", "pipeline", "data_replicate")
    return {name: getattr(layout, name) for name in names}


def _other_ranks(layout: LayoutConfig) -> int:
    return math.prod(_axes(layout).values())
