"""Every kind of wrong value: the message names key, place, value and the way out."""

from itertools import pairwise

import pytest

from megallama.config.load import load_text
from tests.config.sample import HERE, RUN, Case, assert_named, changed, refusal

# One field at a time. The file has the places right before which HERE stands.
FIELDS = [
    Case("steps: 100", "steps: @@many", "train.steps", "a whole number, got 'many'"),
    Case("steps: 100", "steps: @@1e3", "train.steps", "got 1e3: write 1000", "train.steps=1000"),
    Case("steps: 100", "steps: @@300.0", "train.steps", "got 300.0: write 300", "train.steps=300"),
    Case("steps: 100", "steps: @@12.5", "train.steps", "expected a whole number, got 12.5"),
    Case("steps: 100", "steps: @@true", "train.steps", "expected a whole number, got true"),
    Case("steps: 100", "steps: @@'100'", "train.steps", "got '100': write 100", "train.steps=100"),
    Case(
        "steps: 100",
        "steps: @@'1,000'",
        "train.steps",
        "got '1,000': write 1000",
        "train.steps=1000",
    ),
    Case("steps: 100", "steps: @@-5", "train.steps", "expected a number above 0, got -5"),
    Case("steps: 100", "steps: @@0", "train.steps", "expected a number above 0, got 0"),
    Case("steps: 100", "steps: @@[1]", "train.steps", "expected a whole number, got a list"),
    Case("steps: 100", "steps: @@{a: 1}", "train.steps", "a whole number, got a section"),
    Case(
        "steps: 100", "steps: @@99999999999999999999", "train.steps", "at most 9223372036854775807"
    ),
    Case("steps: 100", "@@steps: ", "train.steps", "expected a whole number, got nothing"),
    Case("lr: 3e-3", "lr: @@fast", "optimizer.lr", "expected a number, got 'fast'"),
    Case(
        "lr: 3e-3", "lr: @@'3e-3'", "optimizer.lr", "write 3e-3 without quotes", "optimizer.lr=3e-3"
    ),
    Case("lr: 3e-3", "lr: @@false", "optimizer.lr", "expected a number, got false"),
    Case("lr: 3e-3", "lr: @@.inf", "optimizer.lr", "expected a finite number, got .inf"),
    Case("lr: 3e-3", "lr: @@.nan", "optimizer.lr", "expected a finite number, got .nan"),
    Case("lr: 3e-3", "lr: @@-1e-3", "optimizer.lr", "expected a number above 0, got -1e-3"),
    Case("lr: 3e-3", "lr: 3e-3, beta2: @@1.0", "optimizer.beta2", "a number below 1, got 1.0"),
    Case(
        "run: runs/test", "run: @@2024", "run", "got 2024: put it in quotes, '2024'", "run='2024'"
    ),
    Case("run: runs/test", "run: @@''", "run", "expected some text, got ''"),
    Case("run: runs/test", "run: @@[a, b]", "run", "expected text, got a list"),
    Case(
        "seq_len: 192",
        "seq_len: 192, document_mask: @@yes",
        "data.document_mask",
        "expected true or false, got 'yes': write true",
        "data.document_mask=true",
    ),
    Case(
        "seq_len: 192",
        "seq_len: 192, document_mask: @@0",
        "data.document_mask",
        "expected true or false, got 0: write false",
        "data.document_mask=false",
    ),
    Case(
        "min_lr: 3e-4",
        "min_lr: 3e-4, decay: @@cosin",
        "lr_schedule.decay",
        "expected 'cosine', 'linear', 'wsd' or 'constant', got 'cosin': did you mean 'cosine'?",
        "lr_schedule.decay=cosine",
    ),
    Case(
        "steps: 100", "steps: 100, precision: @@16", "train.precision", "'bf16', 'fp32' or 'fp64'"
    ),
    Case("data_shard: 1", "data_shard: @@-2", "layout.data_shard", "expected -1 or more, got -2"),
    Case("seq_len: 192", "sources: @@a.txt", "data.sources", "expected a list, got 'a.txt': for"),
    Case(
        "seq_len: 192", "sources: @@[]", "data.sources", "at least 1 entry, got a list, empty: for"
    ),
    Case("seq_len: 192", "sources: [@@a.txt]", "data.sources.0", "`{path: stdlib}`"),
    Case("seq_len: 192", "sources: [{path: a, weight: @@x}]", "data.sources.0.weight", "got 'x'"),
    Case("seq_len: 192", "sources: [@@{weight: 1}]", "data.sources.0.path", "`path: stdlib`"),
    Case("{lr: 3e-3}", "@@fast", "optimizer", "a section, got 'fast': for example `optimizer: {lr"),
    Case(
        "vocab: 512}", "vocab: 512, rope_scaling: @@8}", "model.rope_scaling", "got 8: for example"
    ),
    Case(
        "vocab: 512}", "vocab: 512, @@rope_scaling: {}}", "model.rope_scaling.factor", "factor: 8.0"
    ),
    Case(
        RUN.splitlines()[1], "model: @@7", "model", "a preset's name or a section, got 7: for exam"
    ),
    Case(
        RUN.splitlines()[1],
        "model: @@llama3_1b",
        "model",
        "'llama3_1b': did you mean 'llama3.2_1b'?",
    ),
    Case(
        RUN.splitlines()[1],
        "model: {preset: @@5}",
        "model.preset",
        "no preset 5: presets are llama",
    ),
]

# A key that is unknown, missing or written twice.
KEYS = [
    Case("steps: 100", "@@stepz: 100", "train.stepz", "unknown key: did you mean 'steps'?"),
    Case(
        "steps: 100", "steps: 100, @@zzz: 1", "train.zzz", "train has global_batch_tokens, steps,"
    ),
    Case("steps: 100", "steps: 100, @@lr: 1", "train.lr", "it belongs in optimizer.lr"),
    Case(
        "lr: 3e-3", "lr: 1, @@steps: 1", "optimizer.steps", "in train.steps, or did you mean 'eps'?"
    ),
    Case("run: runs/test", "@@tensor: 2", "tensor", "it belongs in layout.tensor"),
    Case(
        "run: runs/test", "@@train.seed: 2", "train.seed", "in a file, write `train: {seed: ...}`"
    ),
    Case("run: runs/test", "@@optimiser: {}", "optimiser", "did you mean 'optimizer'?"),
    Case("run: runs/test", "@@1: 2", "1", "unknown key: the top level has run, model, layout"),
    Case("lr: 3e-3", "lr: 3e-3, @@LR: 1", "optimizer.LR", "did you mean 'lr'?"),
    Case("layers: 4", "layers: 4, @@preset_: 1", "model.preset_", "did you mean 'preset'?"),
    Case("steps: 100", "steps: 100, @@steps: 9", "train.steps", "written twice: first on line 5"),
    Case("run: runs/test", "data: {}", "data", "written twice: first on line 1"),
    Case("{lr: 3e-3}", "{}", "optimizer.lr", "required key is missing, for example `lr: 3e-4`"),
    Case("run: runs/test", "? @@[a]\n: 1", "", "a key must be a word, got a list or section"),
    Case("run: runs/test", "run: @@!!binary aGk=", "run", "the tag !!binary is not supported"),
    Case("steps: 100", "steps: @@!!int x", "train.steps", "'x' is not what its tag !!int says"),
    Case("run: runs/test", 'run: @@"a\\0b"', "run", "'a\\x00b' holds a character that is not text"),
]


@pytest.mark.parametrize("case", [*FIELDS, *KEYS], ids=lambda case: case.new[:60])
def test_message_names_key_place_value_and_way_out(case: Case) -> None:
    assert_named(case)


@pytest.mark.parametrize("case", [*FIELDS, *KEYS], ids=lambda case: case.new[:60])
def test_nothing_else_is_blamed(case: Case) -> None:
    """One mistake is one problem: what could not be read does not set off rules about it."""
    error = refusal(changed(case.old, case.new).replace(HERE, ""))
    extra = [p for p in error.problems if case.says not in p.message]
    allowed = {"optimizer", "train.steps"}  # a misspelled required key is also a missing one
    assert {p.key for p in extra} <= allowed, str(error)


@pytest.mark.parametrize("case", [c for c in FIELDS if c.fix], ids=lambda c: c.fix)
def test_the_way_out_works(case: Case) -> None:
    text = changed(case.old, case.new).replace(HERE, "")
    load_text(text, [case.fix])


def test_caret_stands_under_the_value() -> None:
    lines = str(refusal(changed("steps: 100", "steps: many"))).splitlines()
    source, caret = next((a, b) for a, b in pairwise(lines) if "^" in b)
    assert source[caret.index("^") : caret.rindex("^") + 1] == "many"


def test_caret_in_a_very_long_line() -> None:
    long = "steps: 100, " + "compile: false, " + " " * 4000 + "seed: bad"
    lines = str(refusal(changed("steps: 100", long))).splitlines()
    source, caret = next((a, b) for a, b in pairwise(lines) if "^" in b)
    assert source[caret.index("^") : caret.rindex("^") + 1] == "bad"
    assert max(map(len, lines)) < 120


def test_all_problems_at_once_in_order() -> None:
    text = RUN.replace("heads: 4, kv_heads: 2", "heads: 4, kv_heads: 3").replace(
        "ffn: 128", "ffn: x"
    )
    text = text.replace("tensor: 1", "tensor: 3, tensr: 1").replace("seq_len: 192", "seq_len: 1e3")
    text = text.replace("steps: 100", "steps: 5").replace("optimizer: {lr: 3e-3}", "optimizer: {}")
    error = refusal(text, "train.seed=x", "layout.data_replicate=0")
    assert [problem.key for problem in error.problems] == [
        "model.kv_heads",  # a rule between fields, although others of its section are wrong
        "model.ffn",
        "layout.tensor",
        "layout.tensr",
        "data.seq_len",
        "optimizer.lr",
        "lr_schedule.warmup_steps",
        "train.seed",
        "layout.data_replicate",
    ], str(error)
    assert str(error).startswith("run.yaml: 9 problems\n")
