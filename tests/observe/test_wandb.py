import json
import math
import os
import re
import subprocess
import sys
import types

import pytest

from megallama.config.errors import UserError
from megallama.config.schema import WandbConfig
from megallama.observe.wandb_mode import choose_mode, find_wandb
from megallama.observe.wandb_sink import WandbSink, run_id
from tests.observe.samples import EVAL, INFO, step

SERVER = "https://metrics.example"


@pytest.fixture(autouse=True)
def no_credentials(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")


class Settings:
    """What choose_mode reads of wandb's settings."""

    def __init__(self, base_url="https://public.example", api_key=None):
        self.base_url, self.api_key = base_url, api_key


def mode(config_mode, base_url="https://public.example", api_key=None):
    return choose_mode(WandbConfig(mode=config_mode), Settings(base_url, api_key))


def test_without_a_key_everything_is_offline():
    assert mode("auto") == mode("online") == mode("offline") == "offline"


def test_with_a_key_auto_is_online(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode("auto") == mode("online") == "online"
    assert mode("offline") == "offline"


def test_a_key_in_the_settings_counts():
    assert mode("auto", api_key="0" * 40) == "online"


def test_a_key_in_netrc_counts_for_its_server_only(tmp_path):
    (tmp_path / "netrc").write_text("machine metrics.example login user password secret\n")
    assert mode("auto", base_url=SERVER) == "online"
    assert mode("auto", base_url="https://other.example") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert mode("auto") == "online"
    assert mode("auto", base_url=SERVER) == "offline"
    (tmp_path / "netrc").write_text("not a netrc")
    assert mode("auto", base_url=SERVER) == "offline"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("disabled", "disabled"), ("offline", "offline"), ("dryrun", "offline"), ("online", "online")],
)
def test_auto_follows_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", value)
    assert mode("auto") == expected


# An empty package is what a folder of old runs named `wandb` imports as.
@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_wandb_that_is_not_installed(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert find_wandb(WandbConfig(mode="auto")) is None
    assert find_wandb(WandbConfig(mode="disabled")) is None
    for explicit in ("online", "offline"):
        with pytest.raises(UserError) as error:
            find_wandb(WandbConfig(mode=explicit))
        (problem,) = error.value.problems
        assert problem.key == "metrics.wandb.mode"
        assert "pip install 'megallama[wandb]'" in problem.message


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_its_own(tmp_path):
    folder = tmp_path / "my run"
    first = run_id(folder, resumed=False)
    assert re.fullmatch(r"my-run-[0-9a-f]{8}", first)
    assert run_id(folder, resumed=True) == run_id(folder, resumed=True) == first
    assert run_id(folder, resumed=False) != first
    assert run_id(tmp_path / "no id yet", resumed=True).startswith("no-id-yet-")


def logged(folder):
    """Every step's values, read back with wandb's own reader."""
    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


def test_what_is_logged_offline_can_be_read_back(tmp_path):
    pytest.importorskip("wandb")
    folder, said = tmp_path / "run", []
    for resumed, numbers in ((False, (1, 2)), (True, (2, 3))):
        config = WandbConfig(mode="auto")
        sink = WandbSink(find_wandb(config), config, folder, resumed, said.append)
        sink.start(INFO)
        for number in numbers:
            sink.step(step(number, attempt=int(resumed), mfu=0.1 * number, grad_norm=math.inf))
        sink.evaluation(EVAL)
        sink.close(True)
    assert [text.partition(";")[0] for text in said] == ["wandb logs offline"] * 2
    raise SystemExit(logged(folder))
