"""lora_ref.bench.hardware: bfloat16 is emulated where the device has no such products."""

import pytest
import torch

from lora_ref.bench import hardware
from lora_ref.bench.hardware import emulated_dtypes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "found, emulated",
    [
        ({"avx2": True, "avx512_bf16": False, "amx_tile": False}, True),
        ({"avx2": True}, True),
        ({"avx512_bf16": True}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, False),
        ({"neon": True, "bf16": False}, True),
        ({"neon": True, "bf16": True}, False),
        ({"asimd": True, "fp": True}, True),
        ({"neon": True, "avx512_bf16": True}, True),  # an x86 name says nothing of an ARM
    ],
)
def test_a_cpu_emulates_bfloat16_without_the_flags(found, emulated, monkeypatch):
    monkeypatch.setattr(hardware, "_capabilities", lambda: found)
    assert list(emulated_dtypes(CPU)) == ([torch.bfloat16] if emulated else [])


def test_the_reason_names_the_missing_flags(monkeypatch):
    monkeypatch.setattr(hardware, "_capabilities", lambda: {"avx2": True})
    assert emulated_dtypes(CPU) == {torch.bfloat16: "this CPU has neither of avx512_bf16, amx_bf16"}
    monkeypatch.setattr(hardware, "_capabilities", lambda: {"asimd": True})
    assert emulated_dtypes(CPU) == {torch.bfloat16: "this CPU has neither of bf16, sve_bf16"}


@pytest.mark.parametrize(
    "text, emulated",
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16\nflags\t\t: fpu\n", False),
        ("Features\t: fp asimd\n", True),
        ("Features\t: fp asimd bf16\n", False),
        ("nothing of the kind\n", False),
    ],
)
def test_linux_lists_the_flags_where_torch_cannot_say(text, emulated, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "_capabilities", dict)
    assert bool(emulated_dtypes(CPU)) == emulated


def test_nothing_is_emulated_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(hardware, "_capabilities", dict)
    assert emulated_dtypes(CPU) == {}


def test_an_older_torch_is_asked_for_each_flag(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert hardware._capabilities() == {"avx512_bf16": False, "amx_tile": False}
    assert list(emulated_dtypes(CPU)) == [torch.bfloat16]


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_without_emulation(supported, monkeypatch):
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    expected = {} if supported else {torch.bfloat16: "Tesla T4 has no bfloat16 products"}
    assert emulated_dtypes(CUDA) == expected and asked == [False]


@pytest.mark.parametrize("flags, emulated", [("fpu avx2 fma", True), ("avx2 avx512_bf16", False), (None, False)])
def test_proc_cpuinfo_is_read_where_torch_does_not_tell(flags, emulated, monkeypatch, tmp_path):
    for name in ("get_capabilities", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr("lora_ref.bench.hardware.CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    found = emulated_dtypes(CPU)
    assert (torch.bfloat16 in found) == emulated
    assert all("avx512_bf16, amx_bf16" in reason for reason in found.values())


def test_older_torch_answers_by_single_questions(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert emulated_dtypes(CPU) == {}
