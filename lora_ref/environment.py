"""The machine that something ran on: device, driver, versions, load, and the energy that it took.

Every record of this package describes its machine with `environment`. Nothing is guessed: what the system does not
tell is None, or "unknown".
"""

import os
import platform
import subprocess
from collections.abc import Iterable
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


def environment(device: torch.device | str, processes: int = 1, load: float | None = None) -> dict:
    """A description of this machine and its software, ready for a JSON file; the machine's own name is not in it.

    Args:
        device: what ran: torch.device("cpu"), torch.device("cuda", 0), … or its name.
        processes: how many processes ran together.
        load: the function `load`'s value before the start; above 0, cores were busy with something else.

    Returns:
        device: the device's type, "cpu" or "cuda".
        device_name: the processor's or the GPU's name.
        driver: the GPU driver's version; None on a CPU.
        cuda: the CUDA (or ROCm) version that torch was built for; None on a CPU.
        processes, load: the arguments.
        threads: CPU threads that torch uses in each process.
        cores: logical CPU cores of the machine; None where the system does not tell.
        cpu_capability: the widest vector instructions that torch uses on this CPU, such as "AVX2".
        platform: operating system and machine type, such as "Linux x86_64".
        python: Python's version.
        libraries: names of LIBRARIES → versions, of those that are installed.
        git: see `revision`.

    Example:
        >>> found = environment("cpu", load=0.5)
        >>> found["device"], found["driver"], found["processes"], found["load"]
        ('cpu', None, 1, 0.5)
        >>> "torch" in found["libraries"] and found["threads"] >= 1
        True
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if gpu else processor(),
        "driver": _driver() if gpu else None,
        "cuda": (torch.version.cuda or f"ROCm {torch.version.hip}") if gpu else None,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": load,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": versions(),
        "git": revision(),
    }


def processor() -> str:
    """The processor's name, as the system gives it.

    Returns:
        The model name of /proc/cpuinfo, else what Python's `platform` finds, else "unknown".

    Example:
        >>> len(processor()) > 0
        True
    """
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _driver() -> str:
    """The NVIDIA driver's version, or "unknown"."""
    found = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else "unknown"


def versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """The installed versions of some distributions.

    Args:
        names: distributions by the name under which pip installs them ("scikit-learn", not "sklearn").

    Returns:
        Name → version; a distribution that is not installed is left out.

    Example:
        >>> list(versions(["torch", "no-such-distribution"]))
        ['torch']
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The git revision of this package's source.

    Returns:
        The commit's 40 digits, followed by "+" where files of the package differ from it; None outside a repository.

    Example:
        >>> revision() is None or len(revision().rstrip("+")) == 40
        True
    """
    here = Path(__file__).resolve().parent
    if not _output_of("git", "-C", str(here), "ls-files", "../__init__.py"):
        return None
    head = _output_of("git", "-C", str(here), "rev-parse", "HEAD")
    if not head:
        return None
    changed = _output_of("git", "-C", str(here), "status", "--porcelain", "..")
    return f"{head}+" if changed else head


def load() -> float | None:
    """How busy the machine's cores are.

    Returns:
        Processes that ran or waited for a core in the last minute, on average; None where the system does not tell.

    Example:
        >>> busy = load()
        >>> busy is None or busy >= 0
        True
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Energy:
    """A meter: the joules that a device has taken since the meter was made.

    On a CPU it reads the packages' counters (RAPL; usually readable by administrators only), on a GPU the driver's
    (NVML, with the library nvidia-ml-py). Whatever else ran on the device at the time is included.

    Args:
        device: a CPU or a CUDA device; any other gives None.

    Example:
        >>> meter = Energy(torch.device("cpu"))
        >>> total = sum(i * i for i in range(1000))
        >>> joules = meter.joules()
        >>> joules is None or joules >= 0
        True
    """

    def __init__(self, device: torch.device):
        self.device, self.start = device, self.read(device)

    def joules(self) -> float | None:
        """Joules since this meter was made; None where the system does not tell."""
        now = self.read(self.device)
        if self.start is None or now is None or len(now) != len(self.start):
            return None
        return sum((after - before) % wrap for (before, wrap), (after, _) in zip(self.start, now, strict=True))

    @staticmethod
    def read(device: torch.device) -> list[tuple[float, float]] | None:
        """For each counter (its joules, the joules at which it starts again from 0); None without a counter."""
        try:
            if device.type == "cuda":
                import pynvml

                pynvml.nvmlInit()
                uuid = str(torch.cuda.get_device_properties(device).uuid)
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
                return [(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, float(2**53))]
            packages = sorted(RAPL.glob("*-rapl:[0-9]")) if device.type == "cpu" else []
            counters = [
                (
                    int((package / "energy_uj").read_text()) / 1e6,
                    int((package / "max_energy_range_uj").read_text()) / 1e6,
                )
                for package in packages
            ]
            return counters or None
        except Exception:  # missing library, driver or permission: a run continues without a meter
            return None


def _output_of(*command: str) -> str:
    """What a command prints, stripped; empty where it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
