"""The decorator that the other rooms test with: what it gives to a body, and what it shows."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ranks


@ranks(2)
def unequal_in_rank_1():
    rank = int(os.environ["RANK"])
    print(f"here is rank {rank}")
    assert rank + 40 == 40


@ranks(3, timeout_s=3)
def waits_for_rank_1():
    from torch import distributed as dist

    if dist.get_rank() == 1:
        a_place_to_hang()


def a_place_to_hang():
    time.sleep(600)


def failure_of(test) -> str:
    with pytest.raises(pytest.fail.Exception) as failed:
        test()
    return str(failed.value)


def test_failure_shows_values_and_output_of_the_failed_rank_only():
    shown = failure_of(unequal_in_rank_1)
    assert "rank 1 failed: AssertionError: assert (1 + 40) == 40" in shown
    assert "in unequal_in_rank_1" in shown
    assert "--- rank 1 printed ---\nhere is rank 1\n" in shown
    assert "rank 0" not in shown


def test_hang_shows_the_stacks():
    shown = failure_of(waits_for_rank_1)
    assert shown.startswith("ranks 0, 1, 2 did not finish in 3 s")
    assert "in a_place_to_hang" in shown
    assert "in barrier" in shown


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
@ranks(2)
def test_parameters_and_fixtures_reach_the_body(shape: tuple[int, ...], tmp_path: Path):
    import torch
    from torch import distributed as dist

    ones = torch.ones(shape)
    dist.all_reduce(ones)
    assert torch.equal(ones, torch.full(shape, 2.0))
    draws = [torch.empty(1), torch.empty(1)]
    dist.all_gather(draws, torch.rand(1))
    assert draws[0] == draws[1], "seeds differ"
    assert torch.get_num_threads() == 1
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2


class Shape(tuple):
    """Stands for what a test module defines and passes to its ranks."""


@pytest.mark.parametrize("shape", [Shape((2,))])
@ranks(2)
def test_classes_of_the_test_module_stay_the_same(shape: Shape):
    assert type(shape) is Shape


@ranks(8)
def test_eight_ranks_meet():
    from torch import distributed as dist

    assert dist.get_world_size() == 8


@ranks(1)
def test_ranks_share_our_cache_and_did_not_import_pytest_main():
    assert Path(os.environ["MEGALLAMA_CACHE"]).is_dir()
    assert getattr(sys.modules["__main__"], "__file__", None) is None
