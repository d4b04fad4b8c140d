from __future__ import annotations

from typing import Any

import pytest

from megallama.config.schema import Config

MODEL = {
    "hidden": 128,
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 16,
    "ffn": 256,
    "vocab": 512,
}


@pytest.fixture
def config_for():
    """A config with sections merged over a small default one."""

    def make(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
        layout = {"data_shard": 1} | sections.pop("layout", {})
        plain = {
            "model": MODEL | (model or {}),
            "layout": layout,
            "train": {"global_batch_tokens": 12288, "steps": 10} | sections.pop("train", {}),
            "optimizer": {"lr": 1e-3},
        }
        return Config.model_validate(plain | sections)

    return make
