"""What the kernel says of a process's memory. Linux only; imports nothing that a measured process would not have."""

from __future__ import annotations

from pathlib import Path


def memory_mib(pid: int | str = "self", name: str = "VmHWM") -> float:
    """A size in MiB: VmHWM, the peak (getrusage would count who started the process), or VmRSS, what it holds now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
