"""YAML as it is read: numbers, merges, files that are no config, and text that is no YAML."""

import pickle
from pathlib import Path

import pytest

from megallama.config.errors import Problem, UserError
from megallama.config.load import load_config, load_text
from tests.config.sample import HERE, RUN, changed, load, place, refusal


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 3e-4),
        ("3E+2", 300.0),
        ("1", 1.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000.5", 1000.5),
        ("3.0e-3", 3e-3),
    ],
)
def test_numbers(written: str, value: float) -> None:
    lr = load_text(changed("lr: 3e-3", f"lr: {written}")).optimizer.lr
    assert isinstance(lr, float) and lr == value


@pytest.mark.parametrize(
    ("written", "value"), [("16_777_216", 16_777_216), ("010", 10), ("+7", 7), ("0", 0)]
)
def test_whole_numbers(written: str, value: int) -> None:
    assert load_text(changed("steps: 100", f"steps: 100, seed: {written}")).train.seed == value


@pytest.mark.parametrize("word", ["on", "no", "2026-01-01", "1:30", "0x10", "1e", "=", "NaN"])
def test_words_that_yaml_1_1_would_turn_into_something_else(word: str) -> None:
    assert load_text(changed("run: runs/test", f"run: {word}")).run == word


def test_anchors_and_merges() -> None:
    text = RUN.replace("{seq_len: 192}", "{sources: [&a {path: x, weight: 2}, {<<: *a, path: y}]}")
    first, second = load_text(text).data.sources
    assert (first.path, second.path, second.weight) == ("x", "y", 2.0)


def test_the_first_of_several_merges_wins_and_what_is_written_wins_over_all() -> None:
    entries = (
        "[&a {path: a, weight: 1}, &b {path: b, weight: 2}, {<<: [*b, *a]}, {weight: 9, <<: *a}]"
    )
    sources = load_text(changed("{seq_len: 192}", f"{{sources: {entries}}}")).data.sources
    assert [(s.path, s.weight) for s in sources] == [("a", 1), ("b", 2), ("b", 2), ("a", 9)]


def test_a_mistake_in_a_merged_section_is_named_where_it_is_written() -> None:
    text = changed("{seq_len: 192}", "{sources: [&a {path: x, weight: @@no}, {<<: *a}]}")
    error = refusal(text.replace(HERE, ""))
    assert [p.where for p in error.problems] == [f"run.yaml:{place(text)}"] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {@@", "not valid YAML"),
        ("a:\n@@\tb: 1", "indent with spaces, not tabs"),
        ("run: a@@: b", "check the indentation; quote a value that holds ': '"),
        ("run: @@@x", "put the value in quotes"),
        ("run: @@%x", "put the value in quotes"),
        ("run: @@*nowhere", "undefined alias 'nowhere'"),
        ("run: 1\n@@---\nrun: 2", "keep one config in a file: remove the `---`"),
        ("run: ab@@\x07", "U+0007 is not allowed"),
        ("a:\n  b: 1\n @@c: 1", "keys of one section start in one column"),
        ("model: @@&a [*a]", "an anchor that holds itself"),
        ("@@- a\n- b", "got a list"),
        ("@@many", "expected keys and values such as `model: tiny` at the top level"),
        ("@@3e-4", "got the single value '3e-4'"),
    ],
)
def test_text_that_is_no_config(text: str, says: str) -> None:
    (problem,) = refusal(text.replace(HERE, "", 1)).problems
    assert says in problem.message
    assert problem.where == f"run.yaml:{place(text)}"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 5000,
        'run: "\\UFFFFFFFF"',
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        f"train: {{steps: {'9' * 5000}}}",
        f"optimizer: {{lr: {'9' * 5000}}}",
    ],
    ids=["lists", "sections", "escape", "a billion values", "long int", "long float"],
)
def test_hostile_text_ends_in_a_user_error_soon(text: str) -> None:
    assert len(str(refusal(text))) < 4000


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "{}", "null", "\ufeff"])
def test_empty_file_says_what_a_run_needs(text: str) -> None:
    error = refusal(text)
    assert [problem.key for problem in error.problems] == ["model", "train", "optimizer"]
    assert "train: {global_batch_tokens: 1536, steps: 150}" in str(error)
    assert "it needs lr; for example `optimizer: {lr: 3e-4}`" in str(error)


def test_an_empty_file_and_overrides_are_enough() -> None:
    given = ["model=tiny", "train={global_batch_tokens: 192, steps: 1}", "optimizer.lr=1"]
    assert load_text("", given).model.hidden == 128


def write(folder: Path, data: bytes) -> str:
    path = folder / "run.yaml"
    path.write_bytes(data)
    return str(path)


def test_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    text = changed("steps: 100", "steps: @@x")
    path = write(tmp_path, text.replace(HERE, "").encode())
    with pytest.raises(UserError, match="expected a whole number") as caught:
        load_config(path)
    assert f"{path}:{place(text)}: train.steps" in str(caught.value)


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    text = "\ufeff" + RUN.replace("\n", "\r\n")
    assert load_config(write(tmp_path, text.encode())) == load()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x7fELF\x02\x00", "not allowed in YAML"),
        (b"run: ok\nname: \xff\xfe", "not UTF-8 text: byte 0xff on line 2"),
        (RUN.encode("utf-16"), "not UTF-8 text: byte 0xff on line 1"),
        (b"run: x # " + b"x" * 2**20, "over 1 MiB"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, data))
    assert says in str(caught.value) and "run.yaml" in str(caught.value)


def test_a_folder(tmp_path: Path) -> None:
    write(tmp_path, b"")
    with pytest.raises(UserError, match=r"this is a folder, not a YAML file; it holds .*run\.yaml"):
        load_config(str(tmp_path))


def test_permission_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"mine\.yaml: cannot be read: Permission denied"):
        load_config("mine.yaml")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("quickstrt", "did you mean quickstart?"),
        ("quickstart.yaml", "did you mean quickstart?"),
        ("elsewhere/llama3.1_8b.yml", "did you mean llama3.1_8b_8gpu"),
        ("zzz", "no such file; shipped runs are"),
        ("", "this is a folder"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_missing_files_name_near_runs(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_config(source)
    assert says in str(caught.value)


def test_a_run_folder_does_not_hide_the_shipped_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").run == "runs/quickstart"


def test_user_error_text_and_pickling() -> None:
    error = UserError([Problem("a.b", "wrong", "f:1:2", "a: x\n   ^"), Problem("", "odd")], "f")
    assert str(error) == "f: 2 problems\n  f:1:2: a.b: wrong\n      a: x\n         ^\n  odd"
    assert str(UserError.one("a", "wrong")) == "a: wrong"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
