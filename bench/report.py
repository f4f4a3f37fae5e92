"""What the runs say: medians, spreads, ratios to nginx, goals, and one table. No measuring and no input or output."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from bench import check
from bench.measures import CHANGED, GENERATOR, LOST, MACHINE, OVERLOADED, REFUSED, STREAMS, Mode, Outcome

NGINX, RELAY, DIRECT = "nginx", "relay", "direct"

#: How a figure is compared to nginx's, or to a goal.
RATIO, DIFFERENCE, VALUE = "ratio", "difference", "value"
_MARKS = {CHANGED: "c", LOST: "l", REFUSED: "r", OVERLOADED: "o", GENERATOR: "g", MACHINE: "m"}
_MEANING = {
    CHANGED: "wrong bytes: the events are all there, but framed anew",
    LOST: "wrong bytes: events were lost or streams cut, so the figure does not count",
    REFUSED: "streams were refused or not answered",
    OVERLOADED: "could not keep up with the rate",
    GENERATOR: "the load generator was the limit",
    MACHINE: "had less than a core: the machine was the limit",
}


@dataclass(frozen=True)
class Goal:
    """What the relay is to reach (issue 4)."""

    of: str  # RATIO and DIFFERENCE are to nginx
    limit: float
    least: bool = False  # at least so much, and not at most

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


@dataclass(frozen=True)
class Row:
    key: str
    measure: str
    label: str
    unit: str
    digits: int
    against: str = RATIO  # how it is compared to nginx's
    goal: Goal | None = None
    more_is_better: bool = False


ROWS = (
    Row("event_cpu_us", "events", "CPU for one more event, {streams} streams at 50/s", "µs", 1, goal=Goal(RATIO, 2.0)),
    Row("added_p50_us", "events", "latency added to an event, p50", "µs", 0, goal=Goal(RATIO, 2.5)),
    Row("added_p99_us", "events", "latency added to an event, p99", "µs", 0),
    Row("alone_event_cpu_us", "alone", "CPU for an event that comes alone", "µs", 1),
    Row("alone_added_p50_us", "alone", "- latency added to it, p50", "µs", 0),
    Row("alone_added_p99_us", "alone", "- latency added to it, p99", "µs", 0),
    Row(
        "flood_rate", "flood", "events/s, 50 upstreams never wait", "", 0,
        goal=Goal(RATIO, 1.0, least=True), more_is_better=True,
    ),
    Row("flood_per_cpu", "flood", "- for each second of its CPU", "", 0, more_is_better=True),
    Row("blocks_rate", "blocks", "events/s, upstreams write 256 KiB at once", "", 0, more_is_better=True),
    Row("blocks_per_cpu", "blocks", "- for each second of its CPU", "", 0, more_is_better=True),
    Row("short_cpu_us", "short", "CPU for a stream of 3 events, 200 new/s", "µs", 0, goal=Goal(RATIO, 6.0)),
    Row("short_fast_cpu_us", "short_fast", "- 20 clients, one after the other", "µs", 0, goal=Goal(RATIO, 6.0)),
    Row("short_fast_rate", "short_fast", "- streams/s then", "", 0, more_is_better=True),
    Row("first_p50_ms", "first", "first event, 250 new streams/s, p50", "ms", 2, DIFFERENCE, Goal(DIFFERENCE, 0.8)),
    Row("first_p99_ms", "first", "first event, 250 new streams/s, p99", "ms", 2, DIFFERENCE, Goal(DIFFERENCE, 6.0)),
    Row("many_refused", "many", "{many} open streams: not served", "", 0, VALUE, Goal(VALUE, 0)),
    Row("many_kib", "many", "- memory for each", "KiB", 1, goal=Goal(VALUE, 40)),
    Row("many_event_cpu_us", "many", "- CPU for one more event", "µs", 1),
    Row("many_cost", "many", "- that, in times that at {streams}", "", 2, VALUE, Goal(VALUE, 1.3)),
    Row("tls_reused_cpu_ms", "tls_reused", "CPU for a stream, HTTPS, reused", "ms", 2, goal=Goal(VALUE, 1.2)),
    Row("tls_new_cpu_ms", "tls_new", "CPU for a stream, HTTPS, new connection", "ms", 2, goal=Goal(VALUE, 3.5)),
    Row("tls_new_others_p99_ms", "tls_new", "- other streams' latency meanwhile, p99", "ms", 2, DIFFERENCE),
)  # fmt: skip


@dataclass
class Cell:
    """One row's figure of one peer."""

    rounds: list[float]
    flags: set[str] = field(default_factory=set)
    ratio: float | None = None
    difference: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half of what lies between the lowest and the highest round."""
        return (max(self.rounds) - min(self.rounds)) / 2

    def against(self, how: str) -> float | None:
        return {RATIO: self.ratio, DIFFERENCE: self.difference, VALUE: self.median}[how]

    def as_json(self) -> dict[str, Any]:
        return {
            "median": self.median, "spread": self.spread, "rounds": self.rounds, "ratio_to_nginx": self.ratio,
            "difference_to_nginx": self.difference, "flags": sorted(self.flags),
        }  # fmt: skip


#: By round, measure and peer.
Runs = dict[tuple[int, str, str], Outcome]
#: By row and peer.
Cells = dict[str, dict[str, Cell]]


def cells(runs: Runs, peers: list[str], rounds: int) -> Cells:
    """All figures. A round in which a peer or what it is compared to has failed is left out."""
    values = {key: dict(outcome.values) for key, outcome in runs.items()}
    for (number, measure, peer), found in values.items():
        direct = values.get((number, measure, DIRECT), {})
        for name in [name for name in found if "latency_" in name and name in direct]:
            found[name.replace("latency", "added")] = found[name] - direct[name]
        at_100 = values.get((number, "events", peer), {}).get("event_cpu_us")
        if measure == "many" and at_100 and "many_event_cpu_us" in found:
            found["many_cost"] = found["many_event_cpu_us"] / at_100
    table: Cells = {}
    for row in ROWS:
        by_round = {
            peer: {
                number: values[number, row.measure, peer][row.key]
                for number in range(rounds)
                if row.key in values.get((number, row.measure, peer), {})
            }
            for peer in [*peers, DIRECT]
        }
        table[row.key] = {
            peer: _cell(found, by_round.get(NGINX, {}), _flags(runs, row.measure, peer))
            for peer, found in by_round.items()
            if found
        }
    for key in ("flood_rate", "blocks_rate"):
        for peer, cell in table[key].items():
            _judge_flood(cell, table[key].get(DIRECT) if peer != DIRECT else None)
    return table


def goals(table: Cells) -> dict[str, dict[str, Any]]:
    """Which of the relay's goals are met."""
    found = {}
    for row in ROWS:
        cell = table[row.key].get(RELAY)
        value = cell.against(row.goal.of) if row.goal and cell else None
        if row.goal and cell and value is not None:
            met = row.goal.met_by(value)
            found[row.key] = {
                "of": row.goal.of, "limit": row.goal.limit, "at_least": row.goal.least, "value": value,
                "met": met,
                "said": "met" if met else "not decided" if cell.flags & {GENERATOR, MACHINE} else "missed",
            }  # fmt: skip
    return found


def wrong_bytes(runs: Runs, peer: str) -> dict[str, int]:
    """How many of a peer's streams, over all runs, were not the upstream's byte for byte, by what was wrong."""
    found: dict[str, int] = {}
    for (_, _, who), outcome in runs.items():
        for verdicts in (outcome.raw.get("verdicts", {}), outcome.raw.get("dropped", {})):
            for verdict, count in verdicts.items():
                if who == peer and verdict in {check.CHANGED, check.LOST, check.CUT}:
                    found[verdict] = found.get(verdict, 0) + count
    return found


def others_cores(runs: Runs) -> float:
    """How many cores processes that are no part of this have used while it was measured."""
    seconds = used = 0.0
    for outcome in runs.values():
        for window in outcome.raw.get("windows", {}).values():
            seconds += window["seconds"]
            used += window["machine_cpu"] - sum(window["cpu"].values())
    return max(used, 0.0) / seconds if seconds else 0.0


def as_json(table: Cells, runs: Runs, mode: Mode) -> dict[str, Any]:
    """All there is, for other programs."""
    return {
        "rows": {
            row.key: {
                "label": _label(row, mode),
                "unit": row.unit,
                "peers": {peer: cell.as_json() for peer, cell in table[row.key].items()},
            }
            for row in ROWS
        },
        "goals": goals(table),
        "wrong_bytes": {peer: wrong_bytes(runs, peer) for peer in sorted({peer for _, _, peer in runs})},
        "runs": [
            {
                "round": number,
                "measure": measure,
                "peer": peer,
                "flags": sorted(run.flags),
                "values": run.values,
                **run.raw,
            }
            for (number, measure, peer), run in runs.items()
        ],
    }


def text(table: Cells, labels: dict[str, str], mode: Mode) -> str:
    """The table, as Markdown that can be read as it stands, and the meaning of its marks."""
    peers = list(labels)
    lines = [["", *labels.values(), "goal of the relay"]]
    reached = goals(table)
    marks: set[str] = set()
    for row in ROWS:
        found = table[row.key]
        if not found:
            continue
        line = [_label(row, mode)]
        for peer in peers:
            cell = found.get(peer)
            line.append(_cell_text(row, cell, is_nginx=peer == NGINX) if cell else "–")
            marks |= cell.flags if cell else set()
        lines.append([*line, _goal_text(row, reached.get(row.key))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"{mark}: {_MEANING[flag]}" for flag, mark in _MARKS.items() if flag in marks]
    return "\n".join([*rows, "", *notes])


def _label(row: Row, mode: Mode) -> str:
    label = row.label.format(many=f"{mode.many:,}", streams=STREAMS)
    return f"{label}, {row.unit}" if row.unit else label


def _flags(runs: Runs, measure: str, peer: str) -> set[str]:
    return {flag for (_, of, who), outcome in runs.items() if (of, who) == (measure, peer) for flag in outcome.flags}


def _cell(found: dict[int, float], nginx: dict[int, float], flags: set[str]) -> Cell:
    both = [number for number in found if number in nginx]
    ratios = [found[number] / nginx[number] for number in both if nginx[number] > 0]
    differences = [found[number] - nginx[number] for number in both]
    return Cell(
        list(found.values()),
        flags,
        statistics.median(ratios) if ratios else None,
        statistics.median(differences) if differences else None,
    )


def _judge_flood(cell: Cell, direct: Cell | None) -> None:
    """Without a relay there is no more than a tenth above it: what is measured is the generator."""
    if direct is not None and direct.median < 1.1 * cell.median:
        cell.flags.add(GENERATOR)


def _cell_text(row: Row, cell: Cell, *, is_nginx: bool) -> str:
    said = f"{cell.median:,.{row.digits}f}"
    if len(cell.rounds) > 1:
        said += f" ±{cell.spread:,.{row.digits}f}"
    if not is_nginx and row.against == RATIO and cell.ratio is not None:
        said += f" ({cell.ratio:.{1 if 0.95 <= cell.ratio < 10 else 0 if cell.ratio >= 10 else 2}f}x)"
    if not is_nginx and row.against == DIFFERENCE and cell.difference is not None:
        said += f" ({cell.difference:+.{row.digits}f})"
    marks = "".join(mark for flag, mark in _MARKS.items() if flag in cell.flags)
    return f"{said} {marks}".rstrip()


def _goal_text(row: Row, reached: dict[str, Any] | None) -> str:
    if row.goal is None:
        return ""
    sense = "≥" if row.goal.least else "≤"
    limit = f"{row.goal.limit:g}"
    said = {
        RATIO: f"{sense} {limit}x",
        DIFFERENCE: f"{sense} +{limit} {row.unit}",
        VALUE: f"{sense} {limit} {row.unit}",
    }
    if reached is None:
        return said[row.goal.of].strip()
    return f"{said[row.goal.of].strip()}: {reached['said']}"
