"""The memory that request bodies take in this process, all mounts together (RELAY_BODY_MEMORY)."""

from __future__ import annotations

import threading


class Memory:
    """Bytes of bodies that are held: counted as they arrive, so that announcing much takes nothing from others."""

    def __init__(self) -> None:
        self.held = 0
        self._lock = threading.Lock()

    def take(self, size: int, limit: int) -> bool:
        """Count `size` bytes more, unless that would be over `limit` bytes in all; whether they were counted."""
        with self._lock:
            if self.held + size > limit:
                return False
            self.held += size
            return True

    def give_back(self, size: int) -> None:
        """Count `size` bytes less."""
        with self._lock:
            self.held -= size


memory = Memory()
