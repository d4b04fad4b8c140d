"""The mistakes that `test_bad_input.py` makes: one row each."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.store import Manifest, commit, partial_folder

YAML = """\
model: {hidden: 32, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn: 64, vocab: 512}
layout: {tensor: 1, pipeline: 1}
data: {seq_len: 32}
train: {global_batch_tokens: 256, steps: 6, precision: fp64}
optimizer: {lr: 3e-3}
metrics: {wandb: {mode: disabled}}
"""


@dataclass(frozen=True)
class Case:
    """A mistake in the YAML (`old` replaced by `new`), on the command line, or around it."""

    name: str
    key: str
    says: tuple[str, ...]
    """The value and the way out."""
    old: str = ""
    new: str = ""
    """`@@` stands right before the place that the message must name."""
    given: tuple[str, ...] = ()
    """Overrides; `@` is the test's folder."""
    around: Callable[[Path, pytest.MonkeyPatch], object] = field(default=lambda *_: None)


def file(name: str, content: bytes | str) -> Callable[[Path, pytest.MonkeyPatch], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder, _: (folder / name).write_bytes(data)


def parquet(column: str, damage: bool) -> Callable[[Path, pytest.MonkeyPatch], object]:
    def write(folder: Path, _: pytest.MonkeyPatch) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        target = folder / "data.parquet"
        pq.write_table(pa.table({column: ["some text"] * 100}), target)
        if damage:
            target.write_bytes(target.read_bytes()[:-6])

    return write


def variables(**values: str) -> Callable[[Path, pytest.MonkeyPatch], object]:
    def apply(_: Path, patch: pytest.MonkeyPatch) -> None:
        for name, value in values.items():
            patch.setenv(name, value)

    return apply


def gpus(count: int) -> Callable[[Path, pytest.MonkeyPatch], object]:
    def apply(_: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "is_available", lambda: True)

    return apply


def no_gpus_and(
    more: Callable[[Path, pytest.MonkeyPatch], object],
) -> Callable[[Path, pytest.MonkeyPatch], object]:
    def apply(folder: Path, patch: pytest.MonkeyPatch) -> None:
        no_gpus(folder, patch)
        more(folder, patch)

    return apply


def no_gpus(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.cuda.is_available", lambda: False)


def both(*parts: Callable[[Path, pytest.MonkeyPatch], object]) -> Callable[..., object]:
    return lambda folder, patch: [part(folder, patch) for part in parts]


def no_wandb(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "wandb", None)


def tokenizer(**ids: int) -> Callable[[Path, pytest.MonkeyPatch], object]:
    vocabulary = {"a": 0, **ids}
    return file(
        "tok.json",
        json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}}),
    )


def another_run(folder: Path, _: pytest.MonkeyPatch) -> None:
    root = folder / "run" / "checkpoints"
    partial_folder(root, 5).mkdir(parents=True)
    commit(root, Manifest(5, 1280, {}, {"hidden": 64}, "other", 256, {}))


def a_file_as_run(folder: Path, _: pytest.MonkeyPatch) -> None:
    (folder / "run").write_text("mine")


SOURCE = "data.sources.0.path"

CASES = [
    # what one field holds
    Case(
        "unknown key",
        "train.stepz",
        ("did you mean 'steps'?",),
        old="steps: 6",
        new="steps: 6, @@stepz: 6",
    ),
    Case(
        "key of another section",
        "train.lr",
        ("it belongs in optimizer.lr",),
        old="steps: 6",
        new="steps: 6, @@lr: 6",
    ),
    Case(
        "unknown section",
        "optimiser",
        ("did you mean 'optimizer'?",),
        old="metrics:",
        new="@@optimiser: {}\nmetrics:",
    ),
    Case(
        "wrong type",
        "train.steps",
        ("expected a whole number, got 'many'",),
        old="steps: 6",
        new="steps: @@many",
    ),
    Case(
        "a float for an integer",
        "data.seq_len",
        ("expected a whole number, got 3.2e1",),
        old="seq_len: 32",
        new="seq_len: @@3.2e1",
    ),
    Case(
        "negative steps",
        "train.steps",
        ("expected a number above 0, got -6",),
        old="steps: 6",
        new="steps: @@-6",
    ),
    Case(
        "negative steps on the command line",
        "train.steps",
        ("expected a number above 0, got -6", "command line: train.steps=-6"),
        given=("train.steps=-6",),
    ),
    Case(
        "no such choice",
        "train.precision",
        ("expected 'bf16', 'fp32' or 'fp64', got 'fp16': did you mean",),
        old="precision: fp64",
        new="precision: @@fp16",
    ),
    Case(
        "not a boolean",
        "train.compile",
        ("expected true or false, got 'yes': write true",),
        given=("train.compile=yes",),
    ),
    Case(
        "negative rate",
        "optimizer.lr",
        ("expected a number above 0, got -3e-3",),
        old="lr: 3e-3",
        new="lr: @@-3e-3",
    ),
    Case(
        "missing key",
        "optimizer.lr",
        ("required key is missing, for example `lr: 3e-4`",),
        old="optimizer: {lr: 3e-3}",
        new="@@optimizer: {}",
    ),
    Case(
        "duplicate key",
        "train.steps",
        ("written twice: first on line 4",),
        old="steps: 6",
        new="steps: 6, @@steps: 7",
    ),
    Case(
        "unknown preset",
        "model.preset",
        ("no preset 'llama3.1_8c': did you mean 'llama3.1_8b'?",),
        given=("model=llama3.1_8c",),
    ),
    Case("broken YAML", "", ("my.yaml:4:6: not valid YAML",), old="32}", new="32"),
    Case("a tab", "", ("tab",), old="data: {seq_len: 32}", new="data:\n@@\tseq_len: 32"),
    # overrides
    Case("no equals sign", "", ("expected key=value, such as",), given=("train.steps",)),
    Case("no key", "", ("expected key=value",), given=("=3",)),
    Case(
        "unknown key on the command line",
        "layout.tensr",
        ("did you mean 'tensor'?", "command line: layout.tensr=2"),
        given=("layout.tensr=2",),
    ),
    Case("override is no YAML", "data.sources", (), given=("data.sources=[a",)),
    # fields that do not fit together
    Case(
        "heads not divisible",
        "layout.tensor",
        ("3 does not divide model.heads = 4", "use 1, 2 or 4"),
        old="tensor: 1",
        new="tensor: @@3",
        given=("model.ffn=96", "data.seq_len=48", "train.global_batch_tokens=288"),
    ),
    Case(
        "kv_heads not divisible",
        "model.kv_heads",
        ("3 does not divide model.heads = 4: use 1, 2 or 4",),
        old="kv_heads: 2",
        new="kv_heads: @@3",
    ),
    Case(
        "ffn not divisible",
        "layout.tensor",
        ("4 does not divide model.ffn = 66: use 1 or 2",),
        given=("layout.tensor=4", "model.ffn=66"),
    ),
    Case(
        "tokens not divisible by tensor",
        "data.seq_len",
        ("30 × layout.micro_batch 1 = 30 tokens cannot be cut into", "use 28 or 32"),
        given=("layout.tensor=4", "data.seq_len=30", "train.global_batch_tokens=240"),
    ),
    Case(
        "batch not divisible",
        "train.global_batch_tokens",
        ("250 is not a multiple of data.seq_len 32: use 224 or 256",),
        old="global_batch_tokens: 256",
        new="global_batch_tokens: @@250",
    ),
    Case(
        "more stages than layers",
        "layout.pipeline",
        ("4 ranks are more than model.layers = 2: use 2 or fewer",),
        old="pipeline: 1",
        new="pipeline: @@4",
    ),
    Case(
        "warm-up longer than the run",
        "lr_schedule.warmup_steps",
        ("7 is more than train.steps = 6: use 6 or fewer",),
        given=("lr_schedule.warmup_steps=7",),
    ),
    Case(
        "interleaved without a pipeline",
        "layout.schedule",
        ("needs layout.pipeline of 2 or more, which is 1", "or 2 pipeline ranks"),
        given=("layout.schedule=interleaved_1f1b", "layout.virtual_stages=2"),
    ),
    Case(
        "overlap without GPUs",
        "layout.tensor_overlap",
        ("true needs GPUs", "this machine has none", "set it to false"),
        given=("layout.tensor_overlap=true", "layout.tensor=2"),
        around=both(no_gpus, variables(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")),
    ),
    Case(
        "stages that hold too few layers",
        "layout.stage_layers",
        ("[1] adds up to 1, and model.layers is 2", "leave it out"),
        given=("layout.stage_layers=[1]",),
    ),
    Case(
        "heads that context ranks cannot share",
        "layout.context",
        ("8 ranks cannot exchange tokens", "context_method: all_gather"),
        given=("layout.context=8", "layout.context_method=ulysses"),
    ),
    # the world
    Case(
        "world not a multiple",
        "layout",
        ("= 2 ranks do not divide a world of 3 processes: start 2 or 4",),
        given=("layout.tensor=2",),
        around=variables(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3"),
    ),
    Case(
        "world of another size",
        "layout",
        ("× data_shard 2 = 4 ranks, not 2 processes: start 4, or use data_shard 1",),
        given=("layout.tensor=2", "layout.data_shard=2"),
        around=variables(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2"),
    ),
    Case(
        "batch does not reach every rank of the world",
        "train.global_batch_tokens",
        ("256 is not a multiple of data.seq_len 32 × layout.data_shard 3 = 96: use 192 or 288",),
        around=variables(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3"),
    ),
    Case(
        "half a launcher",
        "environment",
        ("RANK is set, but WORLD_SIZE is missing", "start with torchrun, srun, or none of them"),
        around=variables(RANK="0"),
    ),
    Case(
        "rank is no number",
        "environment",
        ("not a number", "start with torchrun"),
        around=variables(RANK="zero", WORLD_SIZE="2"),
    ),
    Case(
        "a wrong key under torchrun",
        "train.stepz",
        ("did you mean 'steps'?",),
        old="steps: 6",
        new="steps: 6, @@stepz: 6",
        around=variables(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"),
    ),
    Case(
        "more processes than GPUs",
        "layout",
        ("needs 4 GPUs, this machine has 2", "CUDA_VISIBLE_DEVICES= to train on CPU"),
        given=("layout.tensor=4",),
        around=gpus(2),
    ),
    Case(
        "more processes than GPUs under torchrun",
        "layout",
        ("4 processes on this machine, which has 2 GPUs: start one process for each GPU",),
        around=both(
            gpus(2), variables(RANK="0", LOCAL_RANK="0", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")
        ),
    ),
    # the run folder
    Case(
        "run folder is a file",
        "run",
        ("cannot be written", "name a folder you may write, such as runs/mine"),
        around=a_file_as_run,
    ),
    Case(
        "run folder inside a file",
        "run",
        ("cannot be written (Not a directory)", "name a folder you may write"),
        given=("run=@/run/inner",),
        around=a_file_as_run,
    ),
    Case(
        "run folder of another run",
        "run",
        ("holds step 5 of a run with another model, another data", "name a new run folder"),
        given=("data.sources=[{path: @/data.txt}]",),
        around=both(another_run, file("data.txt", "Some text. " * 99)),
    ),
    Case(
        "wandb is not installed",
        "metrics.wandb.mode",
        ("'online' needs wandb, which is not installed: pip install", "or set mode to auto"),
        given=("metrics.wandb.mode=online",),
        around=no_wandb,
    ),
    # data
    Case(
        "no such data",
        SOURCE,
        ("no readable file matches", "correct the path"),
        given=("data.sources=[{path: @/none.jsonl}]",),
    ),
    Case(
        "data is a folder",
        SOURCE,
        ("is a folder: name its files with a glob such as",),
        given=("data.sources=[{path: @}]",),
    ),
    Case(
        "data of another kind",
        SOURCE,
        ("is none of .txt, .jsonl, .parquet: convert it",),
        given=("data.sources=[{path: @/data.csv}]",),
        around=file("data.csv", "a,b"),
    ),
    Case(
        "empty data",
        SOURCE,
        ("holds no text (1 empty files)",),
        given=("data.sources=[{path: @/data.txt}]",),
        around=file("data.txt", ""),
    ),
    Case(
        "not UTF-8",
        SOURCE,
        ("data.txt is not UTF-8 (invalid start byte at byte 3): convert it",),
        given=("data.sources=[{path: @/data.txt}]",),
        around=file("data.txt", b"abc\xff"),
    ),
    Case(
        "corrupt parquet",
        SOURCE,
        ("data.parquet is not a sound parquet file", "write it again"),
        given=("data.sources=[{path: @/data.parquet}]",),
        around=parquet("text", damage=True),
    ),
    Case(
        "parquet without text",
        SOURCE,
        ("has no column 'text' (it has: body): rename one",),
        given=("data.sources=[{path: @/data.parquet}]",),
        around=parquet("body", damage=False),
    ),
    Case(
        "a bad line",
        SOURCE,
        ("data.jsonl:2 is not JSON", "correct or remove it"),
        given=("data.sources=[{path: @/data.jsonl}]",),
        around=file("data.jsonl", '{"text": "a"}\n{"text": \n'),
    ),
    Case(
        "a line without text",
        SOURCE,
        ("data.jsonl:2 has no field 'text' (it has: body): rename or add it",),
        given=("data.sources=[{path: @/data.jsonl}]",),
        around=file("data.jsonl", '{"text": "a"}\n{"body": "b"}\n'),
    ),
    Case(
        "sequences longer than the data",
        "data.seq_len",
        ("32 is too long for the", "or give more text"),
        given=("data.sources=[{path: @/data.txt}]", "data.held_out=0"),
        around=file("data.txt", "short"),
    ),
    Case(
        "no tokenizer",
        "data.tokenizer",
        ("cannot be read", "give 'bpe512' or a tokenizer.json"),
        given=("data.tokenizer=@/none.json",),
    ),
    Case(
        "not a tokenizer",
        "data.tokenizer",
        ("is not a Hugging Face tokenizer.json", "give one"),
        given=("data.tokenizer=@/tok.json",),
        around=file("tok.json", "{}"),
    ),
    Case(
        "tokenizer without borders",
        "data.tokenizer",
        ("marks no document borders: add the tokens of one of these pairs",),
        given=("data.tokenizer=@/tok.json",),
        around=tokenizer(),
    ),
    Case(
        "tokenizer larger than the model's vocabulary",
        "model.vocab",
        ("500 is less than the 512 tokens of data.tokenizer 'bpe512': set model.vocab to 512",),
        given=("model.vocab=500",),
    ),
    Case(
        "Triton without a GPU",
        "kernels.swiglu",
        ("triton needs a GPU, and this machine has none: leave it out, or take torch",),
        given=("kernels.swiglu=triton",),
        around=no_gpus_and(variables(TRITON_INTERPRET="0")),
    ),
    Case(
        "FlashAttention 3 without a Hopper GPU",
        "kernels.attention",
        ("fa3 needs a Hopper GPU, and this machine has none: leave it out",),
        given=("kernels.attention=fa3", "train.precision=bf16"),
        around=no_gpus,
    ),
    Case(
        "no apex",
        "kernels.adamw",
        ("apex is not installed with its CUDA extensions: build it", "or leave it out"),
        given=("kernels.adamw=apex",),
    ),
]
