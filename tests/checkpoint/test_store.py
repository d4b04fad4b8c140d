"""The checkpoint folder without torch: what counts as a checkpoint after any damage or kill."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.store import (
    MANIFEST,
    Manifest,
    commit,
    committed_folder,
    digest_file,
    keep_newest,
    newest_valid,
    partial_folder,
    read_manifest,
    remove_partial,
    verify_files,
)

FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata")


def write(root: Path, step: int, content: bytes = b"") -> Manifest:
    """A checkpoint's files, not yet committed; they differ from step to step."""
    partial = partial_folder(root, step)
    partial.mkdir(parents=True)
    for name in FILES:
        (partial / name).write_bytes(f"{name} of {step} ".encode() * 99 + content)
    return Manifest(
        step=step,
        tokens=step * 256,
        layout={"tensor": 2},
        model={"hidden": 32},
        data_fingerprint="f",
        global_batch_tokens=256,
        files={name: digest_file(partial / name) for name in FILES},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With checkpoints of steps 3 and 6."""
    root = tmp_path / "checkpoints"
    for step in (3, 6):
        commit(root, write(root, step))
    return root


def newest(root: Path) -> int | None:
    manifest, _ = newest_valid(root)
    return manifest and manifest.step


def steps(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_no_folder_is_no_checkpoint(tmp_path: Path):
    assert newest_valid(tmp_path / "none") == (None, [])


def test_what_is_committed_is_read_back(root: Path):
    manifest = write(root, 9)
    folder = commit(root, manifest)
    assert folder == committed_folder(root, 9)
    assert newest_valid(root) == (manifest, [])
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, MANIFEST])


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    for step in (99_999_999, 100_000_000, 7):
        commit(tmp_path, write(tmp_path, step))
    assert newest(tmp_path) == 100_000_000
    keep_newest(tmp_path, 1, 100_000_000)
    assert steps(tmp_path) == ["step-100000000"]


def test_a_partial_checkpoint_is_none(root: Path):
    write(root, 9)
    assert newest_valid(root)[1] == []
    assert newest(root) == 6
    remove_partial(root)
    assert steps(root) == ["step-00000003", "step-00000006"]


def test_keep_removes_the_oldest(root: Path):
    commit(root, write(root, 9))
    keep_newest(root, 2, 9)
    assert steps(root) == ["step-00000006", "step-00000009"]
    keep_newest(root, 2, 9)
    assert newest(root) == 9


def test_a_damaged_newer_one_does_not_push_out_what_was_just_saved(root: Path):
    flip(committed_folder(root, 6) / FILES[0])
    commit(root, write(root, 4))  # resumed from 3, and asked to stop after one step
    keep_newest(root, 1, 4)
    assert newest(root) == 4
    assert steps(root) == ["step-00000004", "step-00000006"]


def test_a_users_copies_are_not_ours(root: Path):
    shutil.copytree(committed_folder(root, 6), root / "step-00000006.good")
    (root / "step-notes").mkdir()
    keep_newest(root, 1, 6)
    assert newest_valid(root)[1] == []
    assert steps(root) == ["step-00000006", "step-00000006.good", "step-notes"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(raw | changes))


def without(folder: Path, key: str) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    del raw[key]
    (folder / MANIFEST).write_text(json.dumps(raw))


def swap(folder: Path, name: str) -> None:
    """The file of this name changes places with the older checkpoint's."""
    older = committed_folder(folder.parent, 3) / name
    ours = folder / name
    ours_content = ours.read_bytes()
    ours.write_bytes(older.read_bytes())
    older.write_bytes(ours_content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"bit in {name}": (lambda f, n=name: flip(f / n), f"content of {name}") for name in FILES},
    **{
        f"{name} cut": (lambda f, n=name: os.truncate(f / n, 10), f"{name} has 10 bytes, not")
        for name in FILES
    },
    **{f"{name} grown": (lambda f, n=name: append(f / n), f"{name} has") for name in FILES},
    **{
        f"{name} gone": (lambda f, n=name: (f / n).unlink(), f"{name} is missing") for name in FILES
    },
    "a folder instead": (
        lambda f: ((f / FILES[0]).unlink(), (f / FILES[0]).mkdir()),
        "is missing",
    ),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "unreadable manifest.json"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), "unreadable manifest.json"),
    "torn manifest": (lambda f: os.truncate(f / MANIFEST, 50), "unreadable manifest.json"),
    "manifest is a list": (lambda f: (f / MANIFEST).write_text("[]"), "unreadable manifest.json"),
    "manifest is binary": (lambda f: (f / MANIFEST).write_bytes(b"\xff\x00"), "unreadable"),
    "no step": (lambda f: without(f, "step"), "unreadable manifest.json"),
    "no files": (lambda f: without(f, "files"), "unreadable manifest.json"),
    "files is a list": (lambda f: edit(f, files=[]), "unreadable manifest.json"),
    "no digest": (lambda f: edit(f, files={FILES[0]: {"size": 1}}), "unreadable manifest.json"),
    "unknown field": (lambda f: edit(f, surprise=1), "unreadable manifest.json"),
    "other format": (lambda f: edit(f, format=2), "format 2, this version reads 1"),
    "other step": (lambda f: edit(f, step=7), "its manifest is of step 7"),
}


def append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_next_older(root: Path, damage: str):
    harm, reason = DAMAGES[damage]
    harm(committed_folder(root, 6))
    manifest, (why,) = newest_valid(root)
    assert manifest
    assert manifest.step == 3
    assert why.startswith("step-00000006: ")
    assert reason in why


def test_a_disk_that_returns_an_error_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch):
    bad = committed_folder(root, 6) / FILES[0]
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == bad:
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    manifest, (why,) = newest_valid(root)
    assert manifest
    assert manifest.step == 3
    assert "step-00000006: cannot be read: [Errno 5] Input/output error" in why


def test_files_swapped_between_steps_spoil_both(root: Path):
    commit(root, write(root, 1))
    swap(committed_folder(root, 6), FILES[1])
    manifest, passed_over = newest_valid(root)
    assert manifest
    assert manifest.step == 1
    assert len(passed_over) == 2


def test_a_renamed_folder_is_passed_over(root: Path):
    committed_folder(root, 6).rename(committed_folder(root, 8))
    manifest, (why,) = newest_valid(root)
    assert manifest
    assert manifest.step == 3
    assert why == "step-00000008: its manifest is of step 6"


def test_an_extra_file_does_no_harm(root: Path):
    (committed_folder(root, 6) / "notes.txt").write_text("mine")
    assert newest_valid(root)[1] == []
    assert newest(root) == 6


def test_nothing_whole_is_no_checkpoint(root: Path):
    for step in (3, 6):
        flip(committed_folder(root, step) / FILES[0])
    manifest, passed_over = newest_valid(root)
    assert manifest is None
    assert len(passed_over) == 2


class Killed(BaseException):
    """Nothing but a test expects it."""


CALLS = ("rename", "fsync", "unlink", "rmdir", "open")


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """The process ends at the `number`-th call that changes the disk; the names of those made."""
    made: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) == number:
                raise Killed
            made.append(name)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return made


def save(root: Path) -> None:
    """What saving step 9 does once the shards are written."""
    raw = json.loads((partial_folder(root, 9) / "about").read_text())
    (partial_folder(root, 9) / "about").unlink()
    files = {name: digest_file(partial_folder(root, 9) / name) for name in FILES}
    commit(root, Manifest(**raw | {"files": files}))
    keep_newest(root, 1, 9)


def interrupted(
    root: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int | None], damaged: str = ""
) -> None:
    """Kill the saving of step 9 at each of its calls: one of `allowed` is the newest, and whole."""
    manifest = write(root, 9, b"new")
    about = {name: value for name, value in vars(manifest).items() if name != "files"}
    (partial_folder(root, 9) / "about").write_text(json.dumps(about))
    seen: set[int | None] = set()
    for number in range(200):
        copy = root.parent / f"killed-{number}"
        shutil.copytree(root, copy)
        with monkeypatch.context() as patch:
            made = kill_at(patch, number)
            try:
                save(copy)
            except Killed:
                finished = False
            else:
                finished = True
        first = newest(copy)
        assert first in allowed, (number, made)
        for folder in copy.glob("step-*"):  # nothing half removed or half written is in sight
            if folder.name != damaged:
                verify_files(folder, read_manifest(folder).files)
        remove_partial(copy)  # the next start
        assert newest(copy) == first
        if first == 9:  # the whole of the new one
            assert (committed_folder(copy, 9) / FILES[0]).read_bytes().endswith(b"new")
        seen.add(first)
        if finished:
            assert number > 10, made
            assert seen == allowed
            assert steps(copy) == ["step-00000009"]
            return
    raise AssertionError("never finished")


def test_killed_at_any_call_it_is_the_older_or_the_newer(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupted(root, monkeypatch, {6, 9})


def test_killed_while_replacing_a_damaged_one(root: Path, monkeypatch: pytest.MonkeyPatch):
    commit(root, write(root, 9))
    flip(committed_folder(root, 9) / FILES[1])
    interrupted(root, monkeypatch, {6, 9}, damaged="step-00000009")


def test_killed_after_an_earlier_kill(root: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(committed_folder(root, 3), root / ".step-00000003.removed")
    interrupted(root, monkeypatch, {6, 9})
