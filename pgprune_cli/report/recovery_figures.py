"""Draw the curves of recoveries: the loss, the divergence on held-out text and the learning rate over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from pgprune_cli.report.charts import HEIGHT, Chart, Figure, spec_of, tooltip
from pgprune_cli.report.recoveries import Recovery

TRAINED, HELDOUT = "divergence in training", "divergence on held-out text"


def figures_of_recovery(recovery: Recovery, prefix: str) -> Iterator[Figure]:
    """Yield all figures for which a recovery has data so far; `prefix` starts their ids."""
    points = _trained(recovery) + _heldout(recovery, HELDOUT)
    if points:
        yield Figure(
            f"{prefix}-divergence",
            "Divergence from the dense model",
            "The divergence of the predictions on the text of each step, and that on the held-out text, which is never "
            "trained on. It starts with the model before the recovery.",
            spec_of(_curves(points)),
        )
    rates = [
        {"step": row.step, "tokens": row.tokens, "rate": row.learning_rate}
        for row in recovery.rows
        if row.learning_rate is not None
    ]
    if len(rates) > 1:
        caption = "It rises at the start and falls to 0."
        yield Figure(f"{prefix}-rate", "Learning rate", caption, spec_of(_rates(rates)))


def comparison_of_recoveries(recoveries: Sequence[Recovery]) -> Iterator[Figure]:
    """Yield a figure with the divergences of several recoveries on their held-out text."""
    points = [point for recovery in recoveries for point in _heldout(recovery, recovery.name)]
    if len(recoveries) > 1 and points:
        caption = "The divergence of each recovery from its dense model, on its own held-out text."
        yield Figure("recoveries", "Recoveries", caption, spec_of(_curves(points)))


def _trained(recovery: Recovery) -> list[dict[str, Any]]:
    return [
        {"step": row.step, "tokens": row.tokens, "value": round(row.divergence, 5), "of": TRAINED}
        for row in recovery.rows
        if row.divergence is not None
    ]


def _heldout(recovery: Recovery, name: str) -> list[dict[str, Any]]:
    return [
        {"step": row.step, "tokens": row.tokens, "value": round(row.heldout_divergence, 5), "of": name}
        for row in recovery.rows
        if row.heldout_divergence is not None
    ]


def _curves(points: list[dict[str, Any]]) -> Chart:
    line = alt.Chart(alt.Data(values=points)).encode(
        _tokens(),
        alt.Y("value:Q", title="nats per token", scale=alt.Scale(zero=False)),
        alt.Color("of:N", title=None),
        tooltip=tooltip(step="step:Q", tokens="tokens:Q", divergence="value:Q", of="of:N"),
    )
    dots = line.transform_filter(alt.FieldOneOfPredicate("of", _evaluated(points))).mark_point(filled=True, size=36)
    return alt.layer(line.mark_line(), dots).properties(width="container", height=HEIGHT)


def _evaluated(points: list[dict[str, Any]]) -> list[str]:
    """Return the names of the curves whose points are evaluations, which are few."""
    return sorted({point["of"] for point in points} - {TRAINED})


def _rates(rates: list[dict[str, Any]]) -> Chart:
    return (
        alt.Chart(alt.Data(values=rates))
        .mark_line()
        .encode(
            _tokens(),
            alt.Y("rate:Q", title="learning rate", axis=alt.Axis(format=".1e", tickCount=4)),
            tooltip=tooltip(step="step:Q", tokens="tokens:Q", rate="rate:Q"),
        )
        .properties(width="container", height=HEIGHT * 0.6)
    )


def _tokens() -> alt.X:
    """Return an axis that counts the tokens that were trained on."""
    return alt.X("tokens:Q", title="tokens", axis=alt.Axis(format="~s"))
