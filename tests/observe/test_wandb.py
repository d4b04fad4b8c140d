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


def inspect(folder):
    """The records of each offline run, oldest first, read back with wandb's own reader."""
    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append([json.loads(line) for line in out.splitlines()])
    return runs


def test_what_is_logged_offline_can_be_read_back(tmp_path):
    pytest.importorskip("wandb")
    folder, said = tmp_path / "run", []
    for resumed, numbers in ((False, (1, 2)), (True, (2, 3))):
        config = WandbConfig(mode="auto")
        sink = WandbSink(find_wandb(config), config, folder, resumed, said.append)
        sink.start(INFO)
        for number in numbers:
            sink.step(step(number, attempt=int(resumed), mfu=0.25 * number, grad_norm=math.inf))
        sink.evaluation(EVAL)
        sink.close(not resumed)
    runs = inspect(folder)
    assert len(runs) == 2
    chosen = (folder / "wandb_id").read_text().strip()
    for records, text, attempt, numbers in zip(runs, said, (0, 1), ((1, 2), (2, 3)), strict=True):
        (run,) = (r["run"] for r in records if r["type"] == "run")
        assert (run["run_id"], run["project"], run["resume"]) == (chosen, "megallama", True)
        assert run["display_name"] == "run"
        assert run["config"]["update"]["train"] == {"steps": 100}
        assert run["config"]["update"]["run_info"]["layout"] == INFO.layout
        items = [r["history"]["item"] for r in records if r["type"] == "history"]
        assert [item["train/step"] for item in items] == [*numbers, EVAL.step]
        first = items[0]
        assert (first["train/loss"], first["train/attempt"]) == (6.25, attempt)
        assert (first["perf/data_wait_frac"], first["perf/mfu"]) == (0.1, 0.25 * numbers[0])
        assert (first["memory/peak_gib"], first["train/grad_norm"]) == (2.5, "Infinity")
        assert "perf/mfu_palm" not in first
        assert items[-1]["eval/loss"] == 5.5
        (every,) = (r["metric"] for r in records if r.get("metric", {}).get("glob_name") == "*")
        assert every["step_metric"] == "train/step"
        (mfu,) = (r["metric"] for r in records if r.get("metric", {}).get("name") == "perf/mfu")
        assert mfu["summary"] == {"max": True}
        (end,) = (r["exit"] for r in records if r["type"] == "exit")
        assert end.get("exit_code", 0) == attempt
        assert "logs offline;" in text
        assert str(folder / "wandb" / "offline-run-") in text


class FakeRun:
    def __init__(self, wandb):
        self.wandb = wandb
        self.settings = types.SimpleNamespace(sync_dir="offline-run-1")
        self.url = "https://metrics.example/run"

    def define_metric(self, *args, **kwargs):
        self.wandb.call("define_metric")

    def log(self, values):
        self.wandb.call("log")

    def finish(self, exit_code):
        self.wandb.call("finish")


class FakeWandb:
    """wandb with a failure in one call."""

    def __init__(self, fails_at):
        self.fails_at, self.calls = fails_at, []

    class Settings:
        model_fields = ("init_timeout",)
        base_url, api_key = SERVER, None

        def __init__(self, **values):
            self.values = values

    def call(self, name):
        self.calls.append(name)
        if name == self.fails_at:
            raise ConnectionResetError("the service is gone")

    def setup(self, settings):
        self.call("setup")
        assert settings.values["silent"]
        return types.SimpleNamespace(settings=settings)

    def init(self, **values):
        self.call(f"init {values['mode']}")
        assert values["settings"].values == {"silent": True, "console": "off", "init_timeout": 20}
        return FakeRun(self)

    def teardown(self):
        self.call("teardown")


def drive(wandb, folder, config_mode="auto"):
    said = []
    sink = WandbSink(wandb, WandbConfig(mode=config_mode), folder, False, said.append)
    sink.start(INFO)
    sink.step(step(1))
    sink.step(step(2))
    sink.evaluation(EVAL)
    sink.message("hello")
    sink.close(True)
    return [text for text in said if "off from here on" in text or "ConnectionReset" in text]


@pytest.mark.parametrize("call", ["setup", "init offline", "define_metric", "log", "finish"])
def test_a_wandb_that_raises_is_reported_once_and_stays_off(call, tmp_path):
    wandb = FakeWandb(fails_at=call)
    (said,) = drive(wandb, tmp_path)
    assert "wandb is off from here on: ConnectionResetError: the service is gone" in said
    assert wandb.calls[-2:] == [call, "teardown"]
    assert wandb.calls.count(call) == 1


def test_a_wandb_that_works_is_silent_but_for_where_it_logs(tmp_path):
    wandb = FakeWandb(fails_at=None)
    assert drive(wandb, tmp_path) == []
    assert [name for name in wandb.calls if name != "define_metric"] == [
        *("setup", "init offline", "log", "log", "log", "finish")
    ]


def test_online_that_fails_goes_on_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb = FakeWandb(fails_at="init online")
    (said,) = drive(wandb, tmp_path)
    assert "logs offline: ConnectionResetError: the service is gone; upload: wandb sync" in said
    assert wandb.calls[:4] == ["setup", "init online", "teardown", "init offline"]
    assert wandb.calls[-1] == "finish"


def test_online_without_a_key_says_what_is_missing(tmp_path):
    said = []
    wandb = FakeWandb(fails_at=None)
    WandbSink(wandb, WandbConfig(mode="online"), tmp_path, False, said.append).start(INFO)
    assert "no API key" in said[0]
    assert "wandb login" in said[0]
