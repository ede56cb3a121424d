"""Which kinds of numbers a device does not multiply itself, so that torch converts them to 32 bits for each product."""

from collections.abc import Mapping
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
X86_BF16 = ("avx512_bf16", "amx_bf16", "amx_tile")  # any of them multiplies bfloat16
ARM_BF16 = ("bf16", "sve_bf16")


def emulated_dtypes(device: torch.device) -> dict[torch.dtype, str]:
    """The dtypes that this device emulates, each with the reason in words; empty where the system does not tell."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return {}
        return {torch.bfloat16: f"{torch.cuda.get_device_name(device)} has no bfloat16 products"}
    found = _capabilities() or _cpuinfo_flags()
    if not found:
        return {}
    known = ARM_BF16 if "neon" in found or "asimd" in found else X86_BF16
    if any(found.get(name) for name in known):
        return {}
    return {torch.bfloat16: f"this CPU has neither of {', '.join(known[:2])}"}


def _capabilities() -> Mapping[str, object]:
    """What torch detected of the CPU, by name; empty where this torch cannot say."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    questions = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_tile": "_is_amx_tile_supported"}
    return {
        name: getattr(torch.cpu, question)() for name, question in questions.items() if hasattr(torch.cpu, question)
    }


def _cpuinfo_flags() -> dict[str, bool]:
    """The CPU's flags as Linux lists them; empty elsewhere."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        title, _, flags = line.partition(":")
        if title.strip() in ("flags", "Features"):
            return dict.fromkeys(flags.split(), True)
    return {}
