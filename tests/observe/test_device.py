import resource

import pytest
import torch

from megallama.observe.device import device_name, peak_memory_gib, reset_peak_memory

MIB = 2**20


def test_cpu_memory_is_the_resident_set():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_gib(cpu)
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    grown = peak_memory_gib(cpu) - before
    assert 0.9 * block.nbytes / 2**30 < grown < 2 * block.nbytes / 2**30
    most_ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    assert 0.2 * most_ever < before + grown <= 1.01 * most_ever


def test_cpu_has_a_name():
    assert device_name(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_is_the_peak_since_the_reset():
    device = torch.device("cuda", 0)
    torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    reset_peak_memory(device)
    base = peak_memory_gib(device)
    torch.empty(16 * MIB, dtype=torch.uint8, device=device)
    assert peak_memory_gib(device) - base == pytest.approx(16 / 1024)
    assert device_name(device) == torch.cuda.get_device_name(0)
