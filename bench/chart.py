"""The chart: one panel of bars for each of some rows, as SVG. No measuring and no input or output."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from bench.measures import CHANGED, LOST
from bench.report import NGINX, RELAY, ROWS

if TYPE_CHECKING:
    from bench.report import Cell, Cells, Row

#: Rows that tell most, by key, and what a panel calls them.
PANELS = {
    "event_cpu_us": "CPU for one more event",
    "added_p50_us": "Latency added to an event (p50)",
    "flood_rate": "Events per second, never waiting",
    "short_cpu_us": "CPU for a whole short stream",
    "first_p99_ms": "First event at 250 new streams/s (p99)",
    "many_kib": "Memory for an open stream",
}
_COLUMNS = 2
_PANEL, _LABELS, _BAR, _GAP, _MARGIN = 470, 150, 18, 7, 20
_COLOURS = {RELAY: "#0b7a75", NGINX: "#6b7280"}
_OTHER = "#c3c8d0"
#: A bar that would leave no room for the others is cut at so many times the relay's.
_LONGEST = 8.0


def svg(table: Cells, labels: dict[str, str], caption: str) -> str:
    rows = [row for row in ROWS if row.key in PANELS and not labels.keys().isdisjoint(table[row.key])]
    rows.sort(key=lambda row: list(PANELS).index(row.key))
    height_of_panel = 46 + len(labels) * (_BAR + _GAP)
    lines_of_panels = -(-len(rows) // _COLUMNS)
    width = _COLUMNS * _PANEL + _MARGIN
    height = lines_of_panels * height_of_panel + 2 * _MARGIN + 16
    if any(cell.flags & {CHANGED, LOST} for found in table.values() for cell in found.values()):
        caption += "; *: changes the upstream's bytes"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        '<g font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(caption)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, row in enumerate(rows):
        x = _MARGIN + number % _COLUMNS * _PANEL
        y = _MARGIN + number // _COLUMNS * height_of_panel
        parts += _panel(row, table[row.key], labels, x, y)
    parts.append(f'<text x="{_MARGIN}" y="{height - 12}" fill="#6b7280" font-size="11">{escape(caption)}</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _panel(row: Row, found: dict[str, Cell], labels: dict[str, str], x: int, y: int) -> list[str]:
    direction = "more is better" if row.more_is_better else "less is better"
    unit = f"{row.unit}, {direction}" if row.unit else direction
    note = f'<tspan fill="#6b7280" font-weight="400">({escape(unit)})</tspan>'
    parts = [f'<text x="{x}" y="{y + 14}" fill="#111827" font-weight="600">{escape(PANELS[row.key])} {note}</text>']
    room = _PANEL - _LABELS - 90
    values = {peer: max(found[peer].median, 0.0) for peer in labels if peer in found}
    known = values.get(RELAY) or max(values.values())
    longest = min(max(values.values()), _LONGEST * known) or 1.0
    for number, (peer, label) in enumerate(labels.items()):
        top = y + 26 + number * (_BAR + _GAP)
        middle = top + _BAR - 5
        weight = "600" if peer == RELAY else "400"
        parts.append(
            f'<text x="{x + _LABELS - 8}" y="{middle}" text-anchor="end" fill="#111827" font-weight="{weight}">'
            f"{escape(label)}</text>"
        )
        if peer not in values:
            parts.append(f'<text x="{x + _LABELS}" y="{middle}" fill="#6b7280">–</text>')
            continue
        cut = values[peer] > longest
        length = max(room * min(values[peer], longest) / longest, 1.0)
        colour = _COLOURS.get(peer, _OTHER)
        parts.append(f'<rect x="{x + _LABELS}" y="{top}" width="{length:.1f}" height="{_BAR}" fill="{colour}" rx="2"/>')
        if cut:  # a gap near its end says that the bar is longer than it is drawn
            gap = x + _LABELS + length - 16
            parts.append(f'<path d="M{gap:.1f} {top + _BAR + 1} l6 -{_BAR + 2}" stroke="#ffffff" stroke-width="4"/>')
        parts.append(
            f'<text x="{x + _LABELS + length + 6:.1f}" y="{middle}" fill="#374151">'
            f"{values[peer]:,.{row.digits}f}{' *' if found[peer].flags & {CHANGED, LOST} else ''}</text>"
        )
    return parts
