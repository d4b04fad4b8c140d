"""The command line. Each command imports what it needs when it runs: `--help` is instant."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megallama import __version__
from megallama.config.errors import UserError

EXIT_CODES = (
    "exit codes: 0 done, 1 crashed, 2 you must fix something, 3 diverged, 4 preempted, state saved"
)

SPEAKER_S = 20.0
"""How long silent ranks wait for the one that says what the user must fix, in seconds."""

_TRAIN = """\
Train a model. The same command and YAML work in three settings:

  megallama train CONFIG                                  starts the processes the layout needs here
  torchrun --nproc-per-node 8 -m megallama train CONFIG   one process a GPU, one or many nodes
  srun --ntasks-per-node 8 megallama train CONFIG         one task a rank

A run continues from the newest checkpoint in its folder (key `run`)."""

_VERIFY = """\
Prove that a layout computes what one process computes: shrink the model, run the layout on CPU next
to a single-process reference, and compare initial weights, loss, grad norm and every gradient."""

_DRAW = """\
Draw a step of the pipeline as an SVG: one row a rank, one box a forward or backward.

  megallama draw CONFIG [KEY=VALUE ...] --output FILE.svg    as the layout plans it
  megallama draw RUN_FOLDER [--step N] --output FILE.svg     as a run measured it: timeline.jsonl"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `megallama config schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megallama",
        description="Trains Llama-3.1-class models with tensor, pipeline and data parallelism.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"megallama {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_verify(commands)
    _add_draw(commands)
    _add_config(commands)
    return parser


def _add_command(commands: Any, name: str, summary: str, text: str, run: Any) -> Any:
    command = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_source(command: Any) -> None:
    command.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or the name of a shipped run"
    )
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="such as train.steps=20 layout.tensor=4"
    )


def _add_train(commands: Any) -> None:
    _add_source(_add_command(commands, "train", "train a model", _TRAIN, _train))


def _add_verify(commands: Any) -> None:
    command = _add_command(
        commands, "verify", "prove that a layout computes it right", _VERIFY, _verify
    )
    _add_source(command)
    command.add_argument(
        "--dtype",
        choices=("float64", "float32", "bf16"),
        default="float64",
        help="default: float64",
    )
    command.add_argument("--steps", type=int, default=20, help="optimizer steps; default: 20")
    command.add_argument(
        "--processes",
        type=int,
        default=16,
        help="shrink the layout to at most so many; default: 16",
    )
    command.add_argument(
        "--kernels",
        choices=("torch", "interpreter"),
        default="torch",
        help="interpreter: the layout computes with the Triton kernels, on CPU; default: torch",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_draw(commands: Any) -> None:
    command = _add_command(commands, "draw", "draw a step of the pipeline", _DRAW, _draw)
    command.add_argument(
        "source", metavar="CONFIG|RUN_FOLDER", help="a YAML file or shipped run, or a run folder"
    )
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="of a config: layout.virtual_stages=2"
    )
    command.add_argument("--output", metavar="FILE.svg", required=True, help="the picture")
    command.add_argument(
        "--step", type=int, metavar="N", help="of a run folder; default: the last measured"
    )


def _add_config(commands: Any) -> None:
    text = "Look at configurations."
    command = _add_command(commands, "config", "look at configurations", text, None)
    actions = command.add_subparsers(required=True, metavar="ACTION")
    show = _add_command(
        actions, "show", "check a config and print it resolved", "Check and print.", _config_show
    )
    _add_source(show)
    show.add_argument("--world", type=int, metavar="N", help="check it for N processes as well")
    _add_command(
        actions, "schema", "print the JSON Schema for editors", "For editors.", _config_schema
    )
    explain = _add_command(
        actions, "explain", "what each key means", "Every key, or one.", _config_explain
    )
    explain.add_argument("key", nargs="?", help="such as layout or layout.tensor")
    _add_command(actions, "list", "shipped runs and models", "Shipped names.", _config_list)


def _train(options: argparse.Namespace) -> int:
    import torch.distributed as dist
    from megallama_launch.failure import leave

    from megallama.config.load import load_config
    from megallama.train.environment import find_place

    if (place := find_place(os.environ)) is not None:
        try:
            config = load_config(options.config, options.overrides)
        except UserError as error:
            return _user_error(error, speak=place.speaks_for_node)
        code = train_rank(config.model_dump())
        if dist.is_initialized():
            leave(code)  # it failed, and peers stuck in a collective would hold an ordinary exit
        return code
    return _train_alone(load_config(options.config, options.overrides))


def _train_alone(config: Any) -> int:
    import torch
    from megallama_launch.local import run_local

    from megallama.config.rules import required_processes
    from megallama.train.preflight import prepare_run

    devices = torch.cuda.device_count()
    world_size = required_processes(config, devices)
    if devices and world_size > devices:
        raise UserError.one(
            "layout",
            f"needs {world_size} GPUs, this machine has {devices}: use more nodes with torchrun or "
            "srun, a smaller layout, or CUDA_VISIBLE_DEVICES= to train on CPU",
        )
    prepare_run(config, world_size)
    return run_local("megallama.cli:train_rank", world_size, (config.model_dump(),)).exit_code


def train_rank(plain: dict[str, Any]) -> int:
    """Train as the rank that the environment says this process is; returns its exit code.

    Args:
        plain: a `Config` as plain data.

    """
    from megallama_launch.failure import guard

    from megallama.config.schema import Config
    from megallama.mesh import coordinates_of, coordinates_text
    from megallama.train.environment import find_place, set_rendezvous
    from megallama.train.loop import train
    from megallama.train.preflight import prepare_run

    place = find_place(os.environ)
    assert place is not None, "started without a rank"
    try:
        prepared = prepare_run(Config.model_validate(plain), place.world_size)
        set_rendezvous(os.environ, place)
    except UserError as error:
        return _user_error(error, speak=place.speaks_for_node)
    places = coordinates_of(place.rank, prepared.config.layout)
    return guard(train, prepared, place, coordinates=lambda: coordinates_text(places))


def _user_error(error: UserError, *, speak: bool) -> int:
    if speak:
        print(error, file=sys.stderr, flush=True)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(SPEAKER_S)  # torchrun ends all ranks at the first exit: the speaker's must be it
    return error.exit_code


def _verify(options: argparse.Namespace) -> int:
    if options.kernels == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    from megallama.config.load import load_config
    from megallama.verify.report import print_report, to_json
    from megallama.verify.run import VerificationFailed, verify

    config = load_config(options.config, options.overrides)
    try:
        report = verify(
            config,
            dtype=options.dtype,
            steps=options.steps,
            max_processes=options.processes,
            kernels=options.kernels,
        )
    except VerificationFailed as failed:
        return failed.exit_code
    if options.json:
        print(json.dumps(to_json(report), indent=1))
    else:
        print_report(report)
    return 0 if report.passed else 1


def _draw(options: argparse.Namespace) -> int:
    from pathlib import Path

    from megallama.config.load import load_config
    from megallama.config.shipped import names
    from megallama.train.draw import draw_measured, draw_planned

    source, output = Path(options.source), Path(options.output)
    measured = source.is_dir() and options.source not in names("runs")
    if output.suffix != ".svg":
        raise UserError.one("--output", f"{output} is no SVG: use {output.with_suffix('.svg')}")
    if measured and options.overrides:
        what = f"{options.overrides[0]} changes a config, and {source} is a run folder"
        raise UserError.one("", f"{what}: leave it out, or draw {source / 'config.yaml'}")
    if not measured and options.step is not None:
        what = f"{options.step} is a step that was measured, and {source} is a config"
        raise UserError.one("--step", f"{what}: leave it out, or give the run folder")
    if measured:
        picture = draw_measured(source, options.step)
    else:
        config = load_config(options.source, options.overrides)
        picture = draw_planned(config, source.name.removesuffix(".yaml"))
    try:
        output.write_text(picture, encoding="utf-8")
    except OSError as error:
        what = f"{output} cannot be written ({error.strerror}): use a folder that is there"
        raise UserError.one("--output", what) from None
    return 0


def _config_show(options: argparse.Namespace) -> int:
    from megallama.config.describe import to_yaml
    from megallama.config.load import load_config
    from megallama.config.rules import resolve_world

    config = load_config(options.config, options.overrides)
    if options.world is not None:
        config = resolve_world(config, options.world)
    print(to_yaml(config), end="")
    return 0


def _config_schema(_options: argparse.Namespace) -> int:
    from megallama.config.describe import json_schema

    print(json.dumps(json_schema(), indent=1))
    return 0


def _config_explain(options: argparse.Namespace) -> int:
    from megallama.config.describe import describe, explain

    print(explain(options.key) if options.key else describe())
    return 0


def _config_list(_options: argparse.Namespace) -> int:
    from megallama.config.shipped import names

    for shelf in ("runs", "models"):
        print(f"{shelf}: {', '.join(names(shelf))}")
    return 0
