"""Write figures and tables into one HTML file that needs no network and follows the light or dark theme."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from pgprune_cli import __version__
from pgprune_cli.report.charts import Figure
from pgprune_cli.report.facts import commands, environment, evaluation, summary
from pgprune_cli.report.figures import comparison, figures_of
from pgprune_cli.report.gather import Run
from pgprune_cli.report.pareto import measures
from pgprune_cli.report.recoveries import Recovery
from pgprune_cli.report.recovery_figures import comparison_of_recoveries, figures_of_recovery


def page(runs: Sequence[Run | Recovery], reload_after: int | None = None) -> str:
    """Return the HTML of a report about `runs`. With `reload_after`, a browser reloads it after that many seconds."""
    from jinja2 import Environment

    sections = [(run, list(_figures(run, f"run-{number}")), commands(run)) for number, run in enumerate(runs)]
    searches = [run for run in runs if isinstance(run, Run)]
    comparisons = list(comparison(searches, measures(searches))) if len(searches) > 1 else []
    comparisons += comparison_of_recoveries([run for run in runs if isinstance(run, Recovery)])
    all_figures = [*comparisons, *(figure for _, figures, _ in sections for figure in figures)]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_asset("page.html"))
    return template.render(
        title=", ".join(run.name for run in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        version=__version__,
        reload_after=reload_after,
        style=_asset("page.css"),
        script=_asset("page.js"),
        library=_library(),
        summary=summary(runs),
        evaluation=evaluation(runs),
        environment=environment(runs),
        comparison=comparisons,
        sections=sections,
        figures=_figures_as_json(all_figures),
    )


def _figures(run: Run | Recovery, prefix: str) -> Iterator[Figure]:
    return figures_of_recovery(run, prefix) if isinstance(run, Recovery) else figures_of(run, prefix)


def _figures_as_json(figures: Sequence[Figure]) -> str:
    """Return the specifications as JSON that can stand inside a <script>."""
    specs: dict[str, Any] = {figure.id: figure.spec for figure in figures}
    return json.dumps(specs, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    """Return a file of this package."""
    return (files("pgprune_cli.report") / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed, 0.9 MB of JavaScript that come with vl_convert."""
    from vl_convert import javascript_bundle

    library: str = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return library.replace("</script", "<\\/script")
