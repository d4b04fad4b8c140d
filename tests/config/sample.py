"""A small valid run, and how to break it in one place."""

from dataclasses import dataclass

from megallama.config.errors import UserError
from megallama.config.load import load_text
from megallama.config.schema import Config

RUN = """\
run: runs/test
model: {hidden: 64, layers: 4, heads: 4, kv_heads: 2, head_dim: 16, ffn: 128, vocab: 512}
layout: {tensor: 1, context: 1, pipeline: 1, data_shard: 1}
data: {seq_len: 192}
train: {global_batch_tokens: 1536, steps: 100}
optimizer: {lr: 3e-3}
lr_schedule: {warmup_steps: 10, min_lr: 3e-4}
"""

HERE = "@@"  # stands in a broken text right before the place that the error must name


def changed(old: str, new: str) -> str:
    """RUN with `old`, which must stand in it once, replaced by `new`."""
    assert RUN.count(old) == 1, old
    return RUN.replace(old, new)


def place(text: str) -> str:
    """`line:column` of HERE, both counted from 1."""
    before = text[: text.index(HERE)]
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def load(*overrides: str) -> Config:
    return load_text(RUN, overrides, "run.yaml")


def refusal(text: str, *overrides: str) -> UserError:
    """The error that loading `text` must end in."""
    try:
        config = load_text(text, overrides, "run.yaml")
    except UserError as error:
        return error
    raise AssertionError(f"loaded without an error: {config}")


@dataclass(frozen=True)
class Case:
    """One mistake, made by replacing `old` in RUN with `new`, and what its message must hold."""

    old: str
    new: str  # HERE marks the place that the message must name
    key: str
    says: str  # the value and the way out, as they stand in the message
    fix: str = ""  # an override that the message suggests and that must load
    given: str = ""  # overrides, separated by spaces, that are right by themselves


def assert_named(case: Case) -> None:
    """The message names key, place, value and the way out."""
    text = changed(case.old, case.new)
    error = refusal(text.replace(HERE, ""), *case.given.split())
    about = [p for p in error.problems if p.key.startswith(case.key) and case.says in p.message]
    assert len(about) == 1, str(error)
    where = f"run.yaml:{place(text)}" if HERE in text else "run.yaml:"
    exact = about[0].where == where or (HERE not in text and about[0].where.startswith(where))
    assert exact, str(error)
    assert str(error).startswith(f"run.yaml: {len(error.problems)} problem")
    assert f"{about[0].where}: {about[0].key}" in str(error)
