"""What a run runs on: device, driver, versions, and the energy that it took, as far as the system tells."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARIES = (
    "lora_ref",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "safetensors",
    "sacrebleu",
    "datasets",
)
RAPL = Path("/sys/class/powercap")


def environment(device: torch.device, processes: int = 1, load: float | None = None) -> dict:
    """The record's account of where a run ran. Nothing is guessed: what cannot be read is null, or "unknown"."""
    gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if gpu else processor(),
        "driver": driver() if gpu else None,
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}" if gpu else None,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "load": load,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": versions(),
        "git": revision(),
    }


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def driver() -> str:
    """The NVIDIA driver's version."""
    found = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else "unknown"


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The git revision of the source, "+" after it where files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    if not _said("git", "-C", str(here), "ls-files", "../__init__.py"):
        return None
    head = _said("git", "-C", str(here), "rev-parse", "HEAD")
    return head and head + ("+" if _said("git", "-C", str(here), "status", "--porcelain", "..") else "")


def load() -> float | None:
    """Processes that ran or waited for a core in the last minute, on average."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Energy:
    """A meter: joules that the device took since it was made; None where the system does not tell.

    On a CPU the packages' counters (RAPL; usually for administrators only), on a GPU the driver's (NVML, with the
    library nvidia-ml-py). Whatever else ran there at the time is counted too.
    """

    def __init__(self, device: torch.device):
        self.device, self.start = device, self.read(device)

    def joules(self) -> float | None:
        now = self.read(self.device)
        if self.start is None or now is None or len(now) != len(self.start):
            return None
        return sum((b - a) % wrap for (a, wrap), (b, _) in zip(self.start, now))

    @staticmethod
    def read(device: torch.device) -> list[tuple[float, float]] | None:
        """(joules so far, where the counter begins anew) of each counter."""
        try:
            if device.type == "cuda":
                import pynvml

                pynvml.nvmlInit()
                uuid = str(torch.cuda.get_device_properties(device).uuid)
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
                return [(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, float(2**53))]
            found = sorted(RAPL.glob("*-rapl:[0-9]")) if device.type == "cpu" else []
            counters = [(d / "energy_uj", d / "max_energy_range_uj") for d in found]
            return [(int(a.read_text()) / 1e6, int(b.read_text()) / 1e6) for a, b in counters] or None
        except Exception:  # a meter that cannot be read is no reason to stop: missing library, driver or permission
            return None


def _said(*command: str) -> str:
    """What a command prints, empty where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
