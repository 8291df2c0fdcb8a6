"""What all figures of a report share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt

Chart = Any  # altair has a class for each kind of chart, and its methods are typed to return any of them

HEIGHT = 260
"""Pixels. Every plot is as wide as the page allows."""


@dataclass(frozen=True)
class Figure:
    """A plot with its heading and a caption. `id` is unique on the page."""

    id: str
    title: str
    caption: str
    spec: dict[str, Any]


def tooltip(**fields: str) -> list[alt.Tooltip]:
    """Return what the pointer shows on a mark: by title, the field."""
    return [alt.Tooltip(field, title=title) for title, field in fields.items()]


def spec_of(chart: Chart) -> dict[str, Any]:
    """Return the specification of a chart without colours, which come from the page."""
    spec: dict[str, Any] = chart.to_dict()
    del spec["config"]
    return spec
