"""On two GPUs: products that overlap their collectives give what separate ones do."""

import os

import pytest
import torch
import torch.distributed as dist
from megallama_launch.claims import STORE
from megallama_launch.local import run_local

from megallama.parallel import overlap, tensor

T, D, N = 512, 256, 384


def run_body() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    store = dist.FileStore(os.environ[STORE], 2)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    generator = torch.Generator("cuda").manual_seed(rank)

    def draw(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16)
        return x.requires_grad_()

    x, wide = draw(T // 2, D), draw(T, N)
    first, second, back = draw(N, D), draw(D, D), draw(D, N)
    for fused, plain, inputs in (
        (overlap.enter, tensor.enter, (x, first, second)),
        (overlap.leave, tensor.leave, (wide, back)),
    ):
        results = []
        for function in (fused, plain):
            out = function(group, *inputs)
            outs = out if isinstance(out, tuple) else (out,)
            loss = sum(o.float().square().sum() for o in outs)
            results.append([*outs, *torch.autograd.grad(loss, inputs)])
        for ours, theirs in zip(*results, strict=True):
            off = (ours - theirs).float().norm() / theirs.float().norm()
            assert off < 2**-6, off
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_overlap_equals_separate_collectives():
    outcome = run_local("tests.parallel.test_overlap:run_body", 2, (), threads=1, timeout_s=120)
    assert outcome.exit_code == 0, outcome.text
