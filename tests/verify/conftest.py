from __future__ import annotations

import pytest

from tests.verify.layouts import make_config


@pytest.fixture
def config_for():
    return make_config
