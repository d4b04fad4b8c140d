"""The YAML schema: one typed section per concern; every field says what it means and in which unit.

Sections are plain data. Reading YAML, overrides and presets is `load.py`; rules that look at more
than one field are `rules.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**63 - 1  # what torch, numpy and the checkpoint's manifest can hold

Count = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A section of the YAML: unknown keys and wrong types are errors; values cannot change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class RopeScaling(Section):
    """Llama 3.1's frequency scaling (`rope_type: llama3` in Hugging Face configs)."""

    factor: Positive
    """How much the context was extended: 8 for Llama 3.1, 32 for Llama 3.2."""
    low_freq_factor: Positive = 1.0
    """Wavelengths above original_context / low_freq_factor are divided by `factor`."""
    high_freq_factor: Positive = 4.0
    """Wavelengths below original_context / high_freq_factor are left alone."""
    original_context: Count = 8192
    """Positions the unscaled model was trained on."""


class ModelConfig(Section):
    """Shape of the transformer. A preset's name may stand in place of the section."""

    hidden: Count
    """Width of the residual stream."""
    layers: Count
    """Transformer blocks."""
    heads: Count
    """Query heads."""
    kv_heads: Count
    """Key/value heads (grouped-query attention); divides `heads`."""
    head_dim: Count
    """Features per head; even, for rotary embedding."""
    ffn: Count
    """Features of the SwiGLU hidden layer."""
    vocab: Count
    """Tokens the tokenizer knows; rows are padded to a multiple of 128 whatever the layout."""
    norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    rope_theta: Positive = 500_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's frequency scaling; absent for Llama 3."""
    tie_embeddings: bool = False
    """The output head shares the embedding's weight (Llama 3.2 1B and 3B)."""


class LayoutConfig(Section):
    """How many ranks each axis takes, in the order [tensor, context, pipeline, data], tensor
    fastest.
    """

    tensor: Count = 1
    """Ranks that split each weight matrix; sequence parallelism is always on with it."""
    tensor_overlap: bool = False
    """Run tensor-parallel collectives inside the matrix products, through symmetric memory: GPUs of
    one node with NVLink. With context_method all_gather, all but those of attention's entry."""
    context: Count = 1
    """Ranks that split each micro-batch's tokens."""
    context_method: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """How attention sees the tokens of other context ranks: all keys and values are gathered, or
    go round a ring while attention computes, or tokens are exchanged for heads."""
    context_balance: Literal["head_tail", "per_document"] = "head_tail"
    """Which tokens a context rank gets: two chunks of the stream, one from each half, or a head and
    a tail of every document, which evens out the work when documents differ in length."""
    pipeline: Count = 1
    """Ranks that split the layers."""
    data_shard: Annotated[int, Field(ge=-1, le=LARGEST)] = -1
    """Ranks that shard parameters, gradients and optimizer state (FSDP2); -1 is what is left of the
    world."""
    data_replicate: Count = 1
    """Copies of the sharded group (HSDP)."""
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = "1f1b"
    """Order of forwards and backwards over pipeline stages."""
    virtual_stages: Count = 1
    """Stages per pipeline rank; above 1 only with interleaved_1f1b."""
    micro_batch_group: Count | None = None
    """Micro-batches that pass one virtual stage before its rank turns to the next (N of Llama 3,
    section 3.3.2); default `pipeline`, and never fewer while there are that many."""
    stage_layers: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Layers of each stage, in order; only the first and the last may have 0. Default: balanced by
    cost, embedding and head included."""
    micro_batch: Count = 1
    """Sequences in one forward pass of one data-parallel rank."""
    reshard_after_forward: bool | None = None
    """Free gathered weights after each block's forward (ZeRO-3), and reduce gradients with every
    backward. Default: where several ranks shard, there is no pipeline, and a tensor rank's gathered
    weights and gradients would exceed 8 GiB; never with split masters. Over one rank it saves the
    compute-dtype copy of the weights and of their gradients, at a copy each time."""


class SourceConfig(Section):
    """One source of documents."""

    path: Text
    """A file or glob of .txt, .jsonl (field `text`) or .parquet (column `text`), or `stdlib`:
    the source code of Python's standard library, on every machine."""
    weight: Positive = 1.0
    """Share of the samples drawn from this source, relative to the others."""


class DataConfig(Section):
    """What is read, in which order, and how it is cut into sequences."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)] = [SourceConfig(path="stdlib")]
    """Where documents come from."""
    tokenizer: Text = "bpe512"
    """`bpe512` (shipped, for small models) or the path of a Hugging Face `tokenizer.json`."""
    seq_len: Count = 192
    """Tokens in one sequence."""
    document_mask: bool = True
    """Attention does not cross documents, positions restart in each, and no loss is taken on a
    document's first token."""
    held_out: Fraction = 0.02
    """Share of the documents kept for evaluation."""
    cache: Text | None = None
    """Folder for tokenized shards; default ~/.cache/megallama, or $MEGALLAMA_CACHE."""


class TrainConfig(Section):
    """How long, how exactly, and with how much memory."""

    global_batch_tokens: Count
    """Tokens in one optimizer step, over all ranks; a multiple of seq_len."""
    steps: Count
    """Optimizer steps in the whole run."""
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """bf16: compute and gathers in bf16; master weights, accumulation and reduction over data
    ranks in fp32."""
    seed: NonNegative = 42
    """Initial weights and sample order follow from it, whatever the layout."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the global gradient; 0 turns clipping off."""
    activation_checkpointing: Literal["none", "elementwise", "selective", "full"] = "none"
    """What backward recomputes: nothing; the results of norms and of SwiGLU's activation; all but
    matrix products and attention (but a ring's); or whole blocks."""
    compile: bool = False
    """torch.compile each block."""
    deterministic: bool = False
    """Deterministic kernels only; slower, and bitwise repeatable on a GPU."""


class KernelsConfig(Section):
    """What computes each fused operation. auto: Triton on a GPU, torch elsewhere. Without a GPU
    triton needs TRITON_INTERPRET=1, which is for tests: it is very slow.
    """

    rms_norm: Literal["auto", "triton", "torch", "compile", "apex"] = "auto"
    """RMSNorm, and the residual's addition before it. apex: NVIDIA's FusedRMSNorm."""
    swiglu: Literal["auto", "triton", "torch", "compile"] = "auto"
    """SwiGLU's activation."""
    rotary: Literal["auto", "triton", "torch", "compile"] = "auto"
    """Rotary position embedding."""
    cross_entropy: Literal["auto", "triton", "torch", "compile"] = "auto"
    """The passes over logits, chunk by chunk between the head's products."""
    attention: Literal["auto", "flex", "varlen", "fa3"] = "auto"
    """What computes packed documents on a GPU: FlexAttention, or FlashAttention's variable-length
    calls, bf16 only; fa3: those of FlashAttention 3, which has to be installed. auto: varlen for
    the head and tail of a context rank, else flex. Rows of one length go to
    scaled_dot_product_attention, cuDNN's on Hopper."""
    grad_norm: Literal["auto", "triton", "torch"] = "auto"
    """The norm of all gradients."""
    adamw: Literal["auto", "triton", "torch", "apex"] = "auto"
    """The update, if masters are not split. triton: clipping is a part of it. torch: fused AdamW.
    apex: NVIDIA's FusedAdam."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019); weight decay spares the norm weights."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: Positive
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Decay of the gradient's running mean."""
    beta2: Fraction = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, per unit of learning rate."""
    master: Literal["fp32", "split"] = "fp32"
    """How bf16 training keeps its float32 weights: whole, 16 bytes a parameter with the gradient
    and moments, and 2 more where a bf16 copy stays gathered; or split, 14 with that copy: the high
    16 bits are the bf16 weight, cut off rather than rounded, and the gradient is rounded to bf16
    once it has been reduced in float32."""


class LrScheduleConfig(Section):
    """Linear warm-up, then a decay to min_lr at the last step."""

    warmup_steps: NonNegative = 0
    """Steps from 0 to the peak."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm up, stay at the peak, and decay linearly over the last `decay_steps`."""
    decay_steps: Count | None = None
    """Steps of the final decay; wsd only, default a tenth of the run."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the last step."""


class EvaluationConfig(Section):
    """Loss on held-out documents."""

    every: NonNegative = 0
    """Steps between evaluations; 0 turns them off."""
    batches: Count = 1
    """Global batches in one evaluation; always the same ones."""


class CheckpointConfig(Section):
    """Where the run's state goes and how much of it is kept."""

    every: NonNegative = 0
    """Steps between checkpoints; 0 saves only after the last step."""
    keep: Count = 3
    """Newest checkpoints that are kept."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, offline without; never asks, never ends a run. disabled where
    wandb is not installed."""
    project: Text = "megallama"
    """Project the run is filed under."""
    name: Text | None = None
    """Default: the run folder's name."""


class MetricsConfig(Section):
    """What is shown and written every step besides the run folder's metrics.jsonl."""

    console: bool = True
    """A line per step and a progress bar."""
    every: Count = 1
    """Steps between console lines."""
    timeline_every: NonNegative = 0
    """Steps between those whose forwards and backwards are timed, for `megallama draw RUN`; 0 for
    none."""
    wandb: WandbConfig = WandbConfig()


class Config(Section):
    """A whole run."""

    run: Text = "runs/default"
    """The run folder: resolved config, metrics, checkpoints. A run resumes from its newest
    checkpoint."""
    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    kernels: KernelsConfig = KernelsConfig()
    optimizer: OptimizerConfig
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()


GATHERED_LIMIT = 8 * 2**30
"""Bytes of gathered weights and gradients, a tenth of a GPU's memory, that a rank keeps for speed:
with M micro-batches, keeping them saves 2·M - 1 gathers and M - 1 reductions a step."""

GATHERED_BYTES = {"bf16": 2 + 4, "fp32": 4 + 4, "fp64": 8 + 8}
"""Of a parameter: its compute-dtype copy and the gradient that micro-batches add up in."""


def frees_weights(config: Config) -> bool:
    """`reshard_after_forward`, or its default; `data_shard` is resolved."""
    layout = config.layout
    if layout.reshard_after_forward is not None:
        return layout.reshard_after_forward
    parameters = parameter_count(config.model) // layout.tensor
    large = parameters * GATHERED_BYTES[config.train.precision] > GATHERED_LIMIT
    if config.optimizer.master == "split":  # micro-batches would add up in bf16
        return False
    return large and layout.data_shard * layout.context > 1 and layout.pipeline == 1


LOSS_CHUNK = 4096
"""Tokens whose logits exist at a time."""

VOCAB_MULTIPLE = 128


def vocab_rows(model: ModelConfig) -> int:
    """Rows of the embedding and the head: `vocab` padded to a multiple that TP sizes can cut."""
    return -(-model.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parameter_count(model: ModelConfig) -> int:
    """Trained parameters without the padded vocabulary rows: what is published for a model."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    block = model.hidden * (2 * q + 2 * kv + 3 * model.ffn + 2)
    ends = model.vocab * model.hidden * (1 if model.tie_embeddings else 2)
    return model.layers * block + ends + model.hidden
