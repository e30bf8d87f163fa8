"""One comparison with a peer as a row, and the rows as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One claim: a rate of ours, a peer's in the same run, and what bounds both.

    Attributes:
      what: measured, with its sizes.
      device: cpu or cuda.
      unit: of the rates; more is better.
      ours, peer: rates; None is shown as "not measured".
      peer_name: package or, where there is none, the bound that stands in its place.
      ratio: ours over the peer's.
      ratio_cpu: the same by processor time in place of the clock on the wall: what to look at
        when other programs ran.
      floor: what cannot be done without, operations and bytes, in words.
      floor_rate: the rate at which this machine does only that.
      details: all else that is needed to judge or repeat it.
    """

    what: str
    device: str
    unit: str
    ours: float | None
    peer_name: str
    peer: float | None
    ratio: float | None
    ratio_cpu: float | None
    floor: str
    floor_rate: float | None
    details: dict[str, Any] = field(default_factory=dict)


def _number(value: float | None, suffix: str = "") -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}{suffix}" if abs(value) >= 100 else f"{value:.3g}{suffix}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells as a Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows))


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("what", "device", "unit", "ours", "peer", "ratio", "ratio, CPU time", "floor", "rate")
    cells = [
        (
            *(row.what, row.device, row.unit, _number(row.ours)),
            f"{row.peer_name}: {_number(row.peer)}",
            *(_number(row.ratio, "x"), _number(row.ratio_cpu, "x")),
            *(row.floor, _number(row.floor_rate)),
        )
        for row in rows
    ]
    return markdown(head, cells)
