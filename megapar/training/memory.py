"""What a rank's memory is used for: parameters, gradients, optimizer state, and what is left for activations."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from megapar.zero.optimizer import ZeroOptimizer


class MemoryPeak:
    """The most bytes that the process has used since this was made, beyond what it used then: of the device on CUDA, else resident ones.

    Where Linux does not let the resident peak start anew, it is that of the process's whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self._before = self._peak()

    def bytes(self) -> int:
        return self._peak() - self._before

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_by_kind(optimizer: ZeroOptimizer, peak: MemoryPeak) -> dict[str, int]:
    """Bytes of this rank: what is held between steps, by kind; the peak; and as `activations` what of the peak is neither: activations,
    pooled gradients, gathered weights, buffers of messages."""
    held, most = optimizer.bytes_held(), peak.bytes()
    return {**held, "activations": max(0, most - sum(held.values())), "peak": most}
