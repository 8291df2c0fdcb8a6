"""Draw the plots as Vega-Lite specifications. All colours come from the page, in its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import altair as alt

from pgprune_cli.report.charts import HEIGHT, Chart, Figure, spec_of, tooltip
from pgprune_cli.report.gather import ELEMENT, Run, kept_cells, sensitivities, theta_cells, unit_name
from pgprune_cli.report.pareto import Measure
from pgprune_cli.run.evaluation import perplexity_of, with_bos

OBJECTIVES = {
    "loss": "loss",
    "kl": "divergence from the dense model",
    "kl-hidden": "divergence from the dense model, with its residual stream",
}
"""What a search minimises, in words, by `search.objective`."""


def figures_of(run: Run, prefix: str) -> Iterator[Figure]:
    """Yield all figures for which a run has data so far; `prefix` starts their ids."""
    if run.rows:
        yield Figure(
            f"{prefix}-loss",
            OBJECTIVES[run.recipe.search.objective].capitalize(),
            f"The {OBJECTIVES[run.recipe.search.objective]} of the sampled masks on their batches (mean and range), "
            "and that of the current decision on held-out text.",
            spec_of(_losses(run)),
        )
    kept = "kept units" if run.decision else "units kept at the last evaluation"
    for family, widths in (run.widths or {}).items():
        yield Figure(
            f"{prefix}-width-{family}",
            f"Layer widths: {_plural(family)}",
            f"Units before pruning (pale) and {kept}.",
            spec_of(_widths(run.dense(family), widths, family)),
        )
    for family, cells in theta_cells(run).items():
        unit = unit_name(run, family) or family
        caption = f"Keep probability of every {unit} at the last checkpoint{_units_per_cell(cells)}."
        spec = spec_of(_heat(cells, unit, "θ"))
        yield Figure(f"{prefix}-theta-{family}", f"θ: {unit}s", caption, spec)
    for family, cells in kept_cells(run).items():
        caption = f"Kept {_plural(family)} in every layer{_units_per_cell(cells)}."
        spec = spec_of(_heat(cells, ELEMENT[family], "kept"))
        yield Figure(f"{prefix}-kept-{family}", f"Kept {_plural(family)}", caption, spec)
    if rows := sensitivities(run):
        yield Figure(
            f"{prefix}-sensitivity",
            "Sensitivity of the layers",
            "How much an error in a block raises the loss, relative to the other blocks, as the search learned it.",
            spec_of(_sensitivity(rows)),
        )
    for family in _families_with_course(run):
        yield Figure(
            f"{prefix}-course-{family}",
            f"Widths during the search: {_plural(family)}",
            "Kept units of every layer at each evaluation of the decision.",
            spec_of(_course(run, family)),
        )


def comparison(runs: Sequence[Run], measures: Sequence[Measure]) -> Iterator[Figure]:
    """Yield figures that compare runs: perplexity against sparsity, and the held-out loss during the search."""
    for number, measure in enumerate(measures):
        caption = (
            "Sparsity is the fraction of the prunable parameters that is removed. For each model, the line joins the "
            "runs that no other run beats in both."
        )
        yield Figure(f"pareto-{number}", f"Sparsity and {measure.name}", caption, spec_of(_pareto(measure)))
    for bos in (False, True):  # losses with BOS are not comparable to losses without
        courses = {run.name: _heldout(run) for run in runs if run.bos == bos}
        points = [point | {"run": name} for name, course in courses.items() if len(course) > 1 for point in course]
        if points:
            caption = "The loss of each run on its own held-out text."
            name = "heldout-bos" if bos else "heldout"
            yield Figure(name, f"Held-out loss{with_bos(bos)}", caption, spec_of(_heldout_courses(points)))


def _losses(run: Run) -> Chart:
    sampled, heldout = "sampled masks", "decision, on held-out text"
    means = []
    for row, forward_passes in zip(run.rows, run.forward_passes, strict=True):
        losses = [loss for loss in row.losses if loss is not None]
        if losses:
            mean = _loss(row.mean_loss, forward_passes, row.step)
            means.append(mean | {"low": min(losses), "high": max(losses), "of": sampled})
    x = _forward_passes_axis()
    left = alt.Axis(title="nats per token")
    right = alt.Axis(title="perplexity", orient="right", grid=False, labelExpr="format(exp(datum.value), ',.3~r')")
    names = dict(step="step:Q", forward_passes="forward_passes:Q", loss="loss:Q", perplexity="perplexity:N")
    if run.recipe.search.objective != "loss":  # it has no perplexity
        right = alt.Axis(title=None, orient="right", grid=False, labels=False, ticks=False)
        names = {"step": "step:Q", "forward_passes": "forward_passes:Q", "objective": "loss:Q"}
    scale = alt.Scale(zero=False, nice=False, padding=8)
    data = alt.Data(values=means)
    band = alt.Chart(data).mark_area(opacity=0.2).encode(x, alt.Y("low:Q", scale=scale, axis=left), y2="high:Q")
    line = alt.Chart(data).mark_line(point=len(means) < 2).encode(x, alt.Y("loss:Q", scale=scale, axis=right))
    points = [point | {"of": heldout} for point in _heldout(run, "heldout_objective")]
    evaluated = alt.Chart(alt.Data(values=points)).mark_line(point=True)
    evaluated = evaluated.encode(x, alt.Y("loss:Q", scale=scale, axis=None))
    colour = alt.Color("of:N", title=None, scale=alt.Scale(domain=[sampled, heldout]))
    tip = tooltip(**names)
    layers = [band.encode(colour), line.encode(colour, tooltip=tip), evaluated.encode(colour, tooltip=tip)]
    return alt.layer(*layers).resolve_axis(y="independent").properties(width="container", height=HEIGHT)


def _heldout(run: Run, measure: Literal["heldout_loss", "heldout_objective"] = "heldout_loss") -> list[dict[str, Any]]:
    """Return what was measured on held-out text against forward passes, last of all of the written decision."""
    values = [
        (getattr(row, measure), passes, row.step) for row, passes in zip(run.rows, run.forward_passes, strict=True)
    ]
    if (decision := run.decision) is not None:
        values.append((getattr(decision, measure), decision.forward_passes, decision.steps))
    return [_loss(*value) for value in values if value[0] is not None]


def _loss(loss: float | None, forward_passes: int, step: int) -> dict[str, Any]:
    assert loss is not None, "only finite losses are drawn"
    perplexity = perplexity_of(loss)
    return {
        "step": step,
        "forward_passes": forward_passes,
        "loss": round(loss, 5),
        "perplexity": round(perplexity, 3) if math.isfinite(perplexity) else "∞",  # JSON has no infinity
    }


def _widths(before: Sequence[int], after: Sequence[int], family: str) -> Chart:
    rows = [
        {"layer": layer, "before": dense, "after": kept}
        for layer, (dense, kept) in enumerate(zip(before, after, strict=True))
    ]
    tip = tooltip(layer="layer:O", before="before:Q", after="after:Q")
    layer = alt.X("layer:O", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    bars = alt.Chart(alt.Data(values=rows)).encode(layer, tooltip=tip)
    axis = alt.Axis(title=_plural(family), tickMinStep=1)
    dense = bars.mark_bar(opacity=0.25).encode(alt.Y("before:Q", axis=axis))
    kept = bars.mark_bar().encode(alt.Y("after:Q", axis=axis))
    return alt.layer(dense, kept).properties(width="container", height=HEIGHT * 0.6)


def _heat(cells: list[dict[str, Any]], unit: str, value: str) -> Chart:
    layers = len({cell["layer"] for cell in cells})
    chart = alt.Chart(alt.Data(values=cells)).mark_rect()
    return chart.encode(
        alt.X("first:O", title=unit, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        alt.Y("layer:O", axis=alt.Axis(labelOverlap=True)),
        _shade(value),
        tooltip=[*tooltip(layer="layer:O", units="units:N"), alt.Tooltip("value:Q", title=value)],
    ).properties(width="container", height=_heat_map_height(layers))


def _course(run: Run, family: str) -> Chart:
    cells = [
        {
            "forward_passes": forward_passes,
            "layer": layer,
            "value": round(kept / count, 4) if count else 0.0,  # the model may lack the block in this layer
            "kept": f"{kept} of {count}",
        }
        for row, forward_passes in zip(run.rows, run.forward_passes, strict=True)
        if row.kept is not None
        for layer, (kept, count) in enumerate(zip(row.kept[family], run.dense(family), strict=True))
    ]
    return (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            alt.X("forward_passes:O", title="forward passes", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            alt.Y("layer:O", axis=alt.Axis(labelOverlap=True)),
            _shade("kept"),
            tooltip=tooltip(layer="layer:O", forward_passes="forward_passes:O", kept="kept:N"),
        )
        .properties(width="container", height=_heat_map_height(len(run.elements[family])))
    )


def _sensitivity(rows: list[dict[str, Any]]) -> Chart:
    chart = alt.Chart(alt.Data(values=rows)).encode(
        alt.X("layer:O", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        alt.Color("family:N", title=None),
        xOffset="family:N",
        tooltip=tooltip(layer="layer:O", family="family:N", sensitivity="value:Q"),
    )
    scale = alt.Scale(type="log")
    spread = chart.mark_rule().encode(
        alt.Y("low:Q", scale=scale, title="relative sensitivity", axis=alt.Axis(tickCount=4)), y2="high:Q"
    )
    mean = chart.mark_point(filled=True, size=36, opacity=1).encode(alt.Y("value:Q", scale=scale))
    return alt.layer(spread, mean).properties(width="container", height=HEIGHT)


def _pareto(measure: Measure) -> Chart:
    x = alt.X("sparsity:Q", scale=alt.Scale(zero=False, padding=60), axis=alt.Axis(format=".3~p", tickCount=5))
    y = alt.Y(
        "ppl:Q", title=measure.name, scale=alt.Scale(type="log", nice=False, padding=24), axis=alt.Axis(tickCount=5)
    )
    tip = tooltip(run="run:N", model="model:N", sparsity="sparsity:Q", perplexity="ppl:Q")
    chart = alt.Chart(alt.Data(values=measure.points)).encode(x, y)
    colour = alt.Color("model:N", title=None)
    best = chart.transform_filter("datum.best")
    front = best.mark_line(interpolate="step-before", strokeDash=[4, 3], opacity=0.6).encode(colour)
    dots = chart.mark_point(filled=True, size=70, opacity=1).encode(colour, tooltip=tip)
    labelled = chart if len(measure.points) <= 8 else best  # more labels would overlap
    names = labelled.mark_text(dy=-12).encode(text="run:N")
    return alt.layer(front, dots, names).properties(width="container", height=HEIGHT * 1.3)


def _forward_passes_axis() -> Any:
    """Return an axis that counts the forward passes of a search."""
    return alt.X("forward_passes:Q", title="forward passes", axis=alt.Axis(format=",d", tickMinStep=1))


def _heldout_courses(points: list[dict[str, Any]]) -> Chart:
    tip = tooltip(run="run:N", forward_passes="forward_passes:Q", loss="loss:Q", perplexity="perplexity:N")
    return (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=True)
        .encode(
            _forward_passes_axis(),
            alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False)),
            alt.Color("run:N", title=None),
            tooltip=tip,
        )
        .properties(width="container", height=HEIGHT)
    )


def _shade(title: str) -> alt.Color:
    return alt.Color("value:Q", title=title, scale=alt.Scale(domain=[0, 1]))


def _heat_map_height(layers: int) -> int:
    """Return the height of a heat map in pixels."""
    return max(layers * (14 if layers <= 40 else 8), 120)


def _families_with_course(run: Run) -> list[str]:
    """Return the families whose widths were evaluated more than once."""
    evaluated = [row.kept for row in run.rows if row.kept is not None]
    return list(run.elements) if len(evaluated) > 1 else []


def _plural(family: str) -> str:
    return f"{ELEMENT[family]}s" if family in ELEMENT else f"{family}s"


def _units_per_cell(cells: list[dict[str, Any]]) -> str:
    """Return the end of a caption that says how many units a cell shows, "" for one."""
    units = min((cell["first"] for cell in cells if cell["first"]), default=1)
    return f" ({units} units per cell)" if units > 1 else ""
