"""A config's pipeline: its stages, what they cost, and what each rank does. No torch: planner and
pictures ask the same functions as the trainer.
"""

from megallama.config.schema import Config
from megallama.parallel.pipeline.schedule import Action, actions
from megallama.parallel.pipeline.split import end_costs, given_split, split_layers


def layers_of_stages(config: Config) -> list[range]:
    """The layers of each stage, in order: as the layout gives them, or balanced by cost."""
    layout, layers = config.layout, config.model.layers
    if layout.stage_layers is not None:
        return given_split(layout.stage_layers, layers)
    first, last = costs_of_ends(config)
    stages = layout.pipeline * layout.virtual_stages
    return split_layers(layers, stages, first_cost=first, last_cost=last)


def costs_of_ends(config: Config) -> tuple[float, float]:
    """Time of the embedding and of the head, in units of a block's."""
    model = config.model
    return end_costs(
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        ffn=model.ffn,
        vocab=model.vocab,
        seq_len=config.data.seq_len,
    )


def micro_batches_of_step(config: Config) -> int:
    """Micro-batches that one data rank takes in a step; `layout.data_shard` is resolved."""
    layout = config.layout
    sequences = config.train.global_batch_tokens // config.data.seq_len
    return sequences // (layout.micro_batch * layout.data_shard * layout.data_replicate)


def program(
    config: Config, rank: int, micro_batches: int, schedule: str | None = None
) -> list[Action]:
    """What a pipeline rank does in one step, under the layout's schedule or another."""
    layout = config.layout
    return actions(
        schedule or layout.schedule,
        rank,
        layout.pipeline,
        micro_batches,
        virtual_stages=layout.virtual_stages,
        group=layout.micro_batch_group,
    )
