"""The lab, built once for each file, and the table of what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hosts.host import missing
from hosts.lab import Lab
from hosts.streams import Row, table

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The lab of a file, which may say with SETTINGS what else its relays have, and with REDIS that they need one."""
    if reason := missing():
        pytest.skip(reason)
    with Lab(getattr(request.module, "SETTINGS", {}), redis=getattr(request.module, "REDIS", False)) as lab:
        yield lab


@pytest.fixture
def lab(built: Lab) -> Iterator[Lab]:
    """The lab with everybody powered on. After the test nothing may be left of its streams: no relay counts one as
    open, and each has its descriptors back."""
    yield built
    built.settle()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where tests run in this process: those of several have no way to tell."""
    if not table:
        return
    rows = [Row.HEAD, *(row.cells() for row in table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("hosts")
    for row in rows:
        first, *others = (
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        terminalreporter.write_line(" | ".join([first, *others]))
