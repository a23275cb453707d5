"""The most memory that a run takes, in a process that may have run others before."""

import contextlib
import resource
from pathlib import Path

import torch


def forget_peak(device: str) -> None:
    """Counts anew, for a run on this device."""
    if _on_gpu(device):
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what earlier runs gave back is reserved still
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # not every container allows it
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Since `forget_peak`: reserved on the GPU, else resident memory of the process. Where Linux
    does not count anew, since the process began."""
    if _on_gpu(device):
        return torch.cuda.max_memory_reserved()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _on_gpu(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()
