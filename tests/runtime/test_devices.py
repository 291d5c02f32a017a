"""Where a model computes, and in which arithmetic, for CPUs that this machine is not."""

import pytest
import torch

from s3dit.runtime.devices import place

CPUS = {
    "Intel with AMX": ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "cpu, bf16"),
    "Intel without AMX": ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "cpu, bf16 weights, fp32 arithmetic"),
    "Zen": ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "cpu, bf16"),
    "ARM": ({"bf16": True, "cpu_name": "Neoverse"}, "cpu, bf16"),
    "AVX2": ({"avx2": True, "cpu_name": "Intel Core"}, "cpu, fp32"),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_default_on(cpu, monkeypatch):
    able, words = CPUS[cpu]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert str(place("cpu")) == words


def test_a_choice_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert str(place("cpu", "bf16")) == "cpu, bf16 weights, fp32 arithmetic"
    assert str(place("cpu", torch.float32)) == "cpu, fp32"
