"""The house as a whole: who may import what, what is installed, what is written in no file."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from megallama_launch import claims

from megallama.train import environment

ROOT = Path(__file__).parent.parent
INSTALLED = {
    "megallama": ROOT / "megallama",
    "megallama_launch": ROOT / "launch/megallama_launch",
    "megallama_kernels": ROOT / "kernels/megallama_kernels",
}
STANDARD_LIBRARY = frozenset(sys.stdlib_module_names)

# import-linter (pyproject.toml) says who of us may import whom; it sees packages from outside by
# their root name only, and has no allow-lists for them. Those are here.
EXTERNALS = {
    "megallama/config": {"pydantic", "yaml"},
    "megallama/model": {"torch"},
    "megallama/mesh.py": {"torch"},
    "megallama/parallel": {"torch"},
    "megallama/parallel/placements.py": set(),
    "megallama/parallel/pipeline/schedule.py": set(),
    "megallama/parallel/pipeline/simulate.py": set(),
    "megallama/parallel/pipeline/split.py": set(),
    "megallama/parallel/pipeline/stages.py": set(),
    "megallama/parallel/context/split.py": set(),
    "megallama/parallel/volume.py": set(),
    "megallama/train": {"torch"},
    "megallama/data": {"torch", "numpy", "pyarrow", "tokenizers", "xxhash"},
    "megallama/checkpoint": {"torch", "xxhash"},
    "megallama/observe": {"torch", "rich"},
    "launch/megallama_launch": {"torch"},
    "kernels/megallama_kernels": {"torch", "triton"},
}


def imported(file: Path) -> Iterator[str]:
    """Full names of all that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


@pytest.mark.parametrize("place", EXTERNALS)
def test_a_room_imports_no_package_but_its_own(place: str) -> None:
    allowed = EXTERNALS[place] | STANDARD_LIBRARY | set(INSTALLED)
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in python_files(ROOT / place)
        for name in imported(file)
        if name.split(".")[0] not in allowed
    }
    assert not found


def test_the_model_knows_nothing_of_torch_distributed() -> None:
    for file in python_files(ROOT / "megallama/model"):
        text = file.read_text()
        assert not [name for name in imported(file) if name.startswith("torch.distributed")], file
        assert "torch.distributed" not in text, file


def test_both_sides_of_a_local_start_name_the_store_alike() -> None:
    assert environment.STORE == claims.STORE


def test_the_command_line_starts_without_torch() -> None:
    heavy = {"torch", "pydantic", "numpy"}
    code = f"import megallama.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    assert run([sys.executable, "-c", code], cwd=ROOT).strip() == "[]"


SHORT = ["train.steps=2", "lr_schedule.warmup_steps=1", "evaluation.every=0"]

BROKEN_RULES = [
    ("megallama/config/schema.py", "import torch", "config reads YAML"),
    ("megallama/config/schema.py", "import megallama.mesh", "Rooms import"),
    ("megallama/model/llama.py", "import megallama.parallel.tensor", "Rooms import"),
    ("megallama/parallel/data.py", "import megallama.train.step", "Rooms import"),
    ("megallama/data/batch.py", "import megallama.observe.mfu", "Rooms import"),
    ("megallama/checkpoint/store.py", "import megallama.model.llama", "data, checkpoint"),
    ("megallama/train/loop.py", "import megallama_launch.local", "Only cli and verify"),
    ("megallama/train/loop.py", "import megallama.cli", "Rooms import"),
    ("megallama/parallel/placements.py", "import torch", "Placements"),
    ("launch/megallama_launch/local.py", "import megallama.model.llama", "megallama_launch starts"),
    ("kernels/megallama_kernels/rope.py", "import megallama.config.schema", "Kernels know"),
    (
        "launch/megallama_launch/local.py",
        "import megallama_kernels.rope",
        "megallama_launch starts",
    ),
    ("megallama/attic.py", "", "exhaustive"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line", "contract"), BROKEN_RULES)
def test_a_broken_import_rule_is_found(file: str, line: str, contract: str, tmp_path: Path) -> None:
    copy_sources(tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"{line}\n")
    linter = Path(sysconfig.get_path("scripts"), "lint-imports")
    # From inside the copy all packages are the copy's.
    folders = [tmp_path, tmp_path / "launch", tmp_path / "kernels"]
    env = os.environ | {"PYTHONPATH": ":".join(map(str, folders))}
    done = subprocess.run(
        [linter, "--no-cache"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(text.startswith(contract) for text in broken) or contract in done.stdout


def test_every_package_has_an_init() -> None:
    folders = {file.parent for room in INSTALLED.values() for file in room.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.slow
def test_transformers_imports_from_the_repository_root() -> None:
    # A folder of ours, on the path as a namespace package, must not stand in for one of theirs.
    run([sys.executable, "-c", "from transformers import LlamaForCausalLM"], cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    copy_sources(copy)
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)], cwd=out)
    (built,) = out.glob("megallama-*.whl")
    return built


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


@pytest.mark.slow
def test_a_wheel_has_every_module_and_every_data_file(wheel: Path) -> None:
    places = INSTALLED | {"megallama_configs": ROOT / "configs"}
    expected = {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in places.items()
        for file in folder.rglob("*")
        if file.suffix in (".py", ".json", ".yaml")
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert any(name.endswith(".json") for name in names)
    assert "megallama_configs/runs/quickstart.yaml" in names


@pytest.mark.slow
def test_a_plain_install_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The wheel in an environment of its own, which borrows the dependencies of this one."""
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], cwd=tmp_path)
    python = environment / "bin/python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    run([*PIP, *install], cwd=tmp_path)
    (site,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file comes without the .pth files there: no editable install comes along.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = run([str(python), "-c", "import megallama; print(megallama.__file__)"], cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(site)
    command = str(environment / "bin/megallama")
    assert "quickstart" in run([command, "config", "list"], cwd=elsewhere)
    run([command, "train", "quickstart", *SHORT], cwd=elsewhere)
    lines = (elsewhere / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2


def test_no_file_names_a_path_or_a_package_index_of_one_machine() -> None:
    people = re.compile(r"/(?:home|Users)/[a-z]\w*/|(?<![\w.])/root/")
    found, local = [], local_names()
    for file in files_of_the_repository():
        text = file.read_text(errors="replace")
        name = file.relative_to(ROOT)
        found += [f"{name}: {match[0]}" for match in people.finditer(text)]
        found += [f"{name}: a path or index of this machine" for x in local if x in text]
    assert not found


def files_of_the_repository() -> list[Path]:
    """Tracked files, and new ones that would be."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git checkout")
    names = run(listing, cwd=ROOT).splitlines()
    own = Path(__file__).relative_to(ROOT).as_posix()
    return [ROOT / name for name in names if name != own and (ROOT / name).is_file()]


def local_names() -> set[str]:
    """Strings that mean something on this machine only: its paths, and where its pip looks."""
    options = run([*PIP, "config", "list"], cwd=ROOT)
    places = re.findall(r"(?:index-url|find-links)=(.*)", options)
    words = {word for place in places for word in place.strip("'\"").split()}
    public = ("pypi.org", "pytorch.org")
    indexes = {re.sub(r"^\w+://(?:[^/@]*@)?", "", word) for word in words}
    indexes = {word for word in indexes if not word.split("/")[0].endswith(public)}
    hosts = {word.split("/")[0] for word in indexes} - {""}
    here = {str(ROOT), str(Path.home())}
    return {name for name in indexes | hosts | here if len(name) > 5}


def copy_sources(to: Path) -> None:
    """All that an installation is made from."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("megallama", "launch", "kernels", "configs"):
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, to / name, ignore=ignore)


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_readme_shows_a_config_that_loads() -> None:
    from megallama.config.load import load_text

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        load_text(block)


def test_no_document_waits_to_be_filled_in() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert "@@" not in page.read_text(), page
