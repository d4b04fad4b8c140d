"""Applies every axis around the plain model, in the one order that works.

stage -> tensor and context seams -> activation checkpointing, compile -> FSDP -> memory, weights.
"""

import torch

from megallama.config.schema import Config, frees_weights
from megallama.mesh import ProcessGroupManager
from megallama.model.kernels import choose_kernels
from megallama.model.llama import Llama, Part
from megallama.model.seams import Seams
from megallama.parallel.context.compose import context_seams
from megallama.parallel.data import COMPUTE_DTYPE, MASTER_DTYPE, shard_over_data
from megallama.parallel.materialize import materialize
from megallama.parallel.overlap import overlap_seams
from megallama.parallel.pipeline.runtime import LocalStages
from megallama.parallel.pipeline.stages import layers_of_stages
from megallama.parallel.recompute import wrap_block
from megallama.parallel.tensor import shard_over_tensor, tensor_seams


def build_stages(config: Config, groups: ProcessGroupManager, device: torch.device) -> LocalStages:
    """This rank's part of the model, sharded, initialised, ready to train.

    Args:
        config: with `layout.data_shard` resolved.
        groups: of this rank.
        device: where parameters live.

    """
    model, layout, precision = config.model, config.layout, config.train.precision
    split = groups.tensor.size > 1
    seams = Seams(
        **(tensor_seams(groups.tensor, model.kv_heads) if split else {})  # type: ignore[arg-type]
        | (overlap_seams(groups.tensor.group) if split and layout.tensor_overlap else {})
        | context_seams(groups, layout.context_method)
    )
    kernels = choose_kernels(config.kernels, device.type)
    ranges = layers_of_stages(config)
    parts = [
        Part(ranges[s], first=s == 0, last=s == len(ranges) - 1)
        for s in range(groups.pipeline.rank, len(ranges), groups.pipeline.size)
    ]
    with torch.device("meta"):
        module = Llama(model, seams, parts, kernels)
    split_masters = config.optimizer.master == "split"
    module.to(torch.bfloat16 if split_masters else MASTER_DTYPE[precision])
    if split:
        shard_over_tensor(module, groups, model.kv_heads)
    for block in module.layers.values():
        wrap_block(
            block,  # type: ignore[arg-type]
            activation_checkpointing=config.train.activation_checkpointing,
            compile_block=config.train.compile,
        )
    reshard = frees_weights(config)
    shard_over_data(module, groups.fsdp_mesh, precision=precision, reshard_after_forward=reshard)
    seed = config.train.seed
    low = materialize(module, model, groups, seed, device, split_masters=split_masters)
    tokens = config.data.seq_len * layout.micro_batch // layout.context
    return LocalStages(
        module=module,
        low=low,
        count=len(ranges),
        reshard_after_forward=reshard,
        message_shape=(tokens // layout.tensor, model.hidden),
        message_dtype=COMPUTE_DTYPE[precision],
        device=device,
    )
