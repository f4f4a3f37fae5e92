"""How many CPUs this process may use: the affinity mask, and the quota of its cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def allowed(root: Path = Path("/")) -> int:
    """At least 1. A quota of 2.5 CPUs counts as 2: a third worker would stall all three when the quota is used up.

    `root` holds `proc` and `sys`.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        count = os.cpu_count() or 1
    return max(1, min([count, *(int(quota) for quota in quotas(root))]))


def quotas(root: Path) -> Iterator[float]:
    """CPUs granted by each cgroup from the process's own up to the top, of version 2 and 1; none where unlimited.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files (cpu.max)
    https://docs.kernel.org/scheduler/sched-bwc.html (cpu.cfs_quota_us)
    """
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for folder in _upwards(mounts, path):
                quota, _, period = _text(folder / "cpu.max").partition(" ")
                yield from _ratio(quota, period)
        elif "cpu" in controllers.split(","):
            for mount in (mounts / "cpu", mounts / "cpu,cpuacct"):
                for folder in _upwards(mount, path):
                    yield from _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    # In a container the path may be the host's, or climb with `..`: what is not there reads as no limit, and the
    # mount itself, which is the container's own group, comes last.
    parts = [part for part in path.split("/") if part not in {"", ".", ".."}]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _ratio(quota: str, period: str) -> Iterator[float]:
    try:
        granted, every = int(quota), int(period)
    except ValueError:  # "max", or no such file
        return
    if granted > 0 and every > 0:  # version 1 says -1 for unlimited
        yield granted / every


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
