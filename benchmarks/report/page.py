"""The HTML report: one file with the reading, the table, charts to zoom into, and how it was made.

It opens without a network: Plotly's JavaScript is inside, which makes nearly all of the file's 5 MB, and the page's own
policy forbids it to ask for anything. The page itself is `report.css` and `report.js` beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from benchmarks.experiment.arms import appearance, setup
from benchmarks.experiment.experiment import FRAMEWORKS, flat
from benchmarks.records import summary
from benchmarks.records.atomic_files import replacing
from benchmarks.records.summary import PanelResult
from benchmarks.report.charts import Chart, head_maps, line_charts, top_of_logits
from benchmarks.report.comparison import compare
from benchmarks.report.style import caption
from benchmarks.report.verdicts import diverged_at, read

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_MADE = {
    "command": "command",
    "date": "date",
    "git_commit": "commit",
    "muonclip": "muonclip",
    "torch": "torch",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "optax": "optax",
    "python": "Python",
    "cuda": "CUDA",
    "platform": "system",
    "cpu": "CPU",
    "cores": "cores",
    "gpu": "GPU",
}


def write(results: Sequence[PanelResult], path: Path, *, title: str | None = None) -> None:
    """Write the page of these panels, side by side where they are several. Runs that are not finished are named."""
    with replacing(path) as stream:
        stream.write(page(results, title=title).encode())


def page(results: Sequence[PanelResult], *, title: str | None = None) -> str:
    """The page as text."""
    title = title or " · ".join(dict.fromkeys(result.panel.title for result in results))
    subjects = dict.fromkeys(result.panel.subject for result in results)
    charts, drawn = _charts(results)
    body = [
        "<header>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p class=subject>{escape(subject)}</p>" for subject in subjects),
        "</header>",
        _reading(results),
        _tables(results),
        drawn,
        _made(results),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_beside('report.css')}</style>",
            "</head>",
            "<body>",
            *body,
            f'<script type="application/json" id="charts">{_json(charts)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{_beside('report.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _reading(results: Sequence[PanelResult]) -> str:
    parts = ["<section>", "<h2>Reading</h2>"]
    if comparison := compare(results):
        parts += ["<h3>Side by side</h3>", _sentences(comparison, [])]
    for result in results:
        if len(results) > 1:
            parts.append(f"<h3>{escape(result.panel.heading)}</h3>")
        labels = [look.label for look in appearance(result.panel).values()]
        parts.append(_sentences(read(result), labels))
    return "\n".join([*parts, "</section>"])


def _sentences(sentences: Sequence[str], labels: Sequence[str]) -> str:
    """A list; the arm that a sentence begins with is set in bold."""
    items: list[str] = []
    for sentence in sentences:
        label = next((label for label in labels if sentence.startswith(f"{label}: ")), "")
        rest = escape(sentence[len(label) :])
        items.append(f"<li>{f'<b>{escape(label)}</b>' if label else ''}{rest}</li>")
    return f"<ul class=reading>{''.join(items)}</ul>"


def _tables(results: Sequence[PanelResult]) -> str:
    parts = ["<section>", "<h2>Runs</h2>"]
    for result in results:
        if len(results) > 1:
            parts.append(f"<h3>{escape(result.panel.heading)}</h3>")
        head, *rows = summary.rows(result)
        parts.append('<div class="wide"><table class=runs>')
        parts.append(f"<thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead><tbody>")
        for row in rows:
            cells = "".join(f"<td>{escape(cell.replace('nan', 'NaN'))}</td>" for cell in row[1:])
            parts.append(f"<tr><th>{escape(row[0])}</th>{cells}</tr>")
        parts.append("</tbody></table></div>")
        parts += [f"<p class=note>{escape(note)}</p>" for note in _notes(result)]
    return "\n".join([*parts, "</section>"])


def _notes(result: PanelResult) -> list[str]:
    panel, looks = result.panel, appearance(result.panel)
    missing = [(arm, seed) for arm, seed in panel.runs() if seed not in result.summaries.get(arm, {})]
    return [
        *summary.model_notes(result),
        *(
            f"{looks[arm].label}, seed {seed}, diverged: it ended at step {step} of {setup(panel, arm).training.steps}."
            for arm, runs in result.records.items()
            for seed, records in runs.items()
            if (step := diverged_at(records))
        ),
        *(f"{looks[arm].label}, seed {seed}, is not finished and left out." for arm, seed in missing),
    ]


def _charts(results: Sequence[PanelResult]) -> tuple[list[Chart], str]:
    """The charts' data by the number of their place, and the section with the places. Panels stand side by side."""
    panel = results[0].panel
    every = tuple(dict.fromkeys(arm for result in results for arm in result.panel.arms if result.summaries.get(arm)))
    looks = appearance(replace(panel, arms=every))
    colours, labels = ({arm: look[part] for arm, look in looks.items()} for part in (1, 0))
    top = top_of_logits(results)
    lines = [line_charts(result, colours, top) for result in results]
    maps = [head_maps(result, labels, top) for result in results]
    columns = 3 if len(results) == 3 or len(results) > 4 else 2
    charts: list[Chart] = []

    def figure(chart: Chart | None, panel_title: str = "") -> str:
        if chart is None:
            return "<div></div>"
        charts.append(chart)
        where = f"<span class=panel>{escape(panel_title)}</span>" if panel_title else ""
        arm = f' data-arm="{escape(chart["arm"])}"' if "arm" in chart else ""
        words = f"{where}<b>{escape(chart['title'])}</b> <span>{escape(chart['note'])}</span>"
        return (
            f"<figure{arm}><figcaption>{words}</figcaption>"
            f'<div class="chart {chart["kind"]}" id="chart-{len(charts) - 1}"></div></figure>'
        )

    parts = ["<section>", "<h2>Charts</h2>", _legend(results, every, colours), f'<div class="grid columns-{columns}">']
    if len(results) == 1:
        parts += [figure(chart) for chart in lines[0]]
    else:
        for title in dict.fromkeys(chart["title"] for of in lines for chart in of):
            for result, of in zip(results, lines, strict=True):
                found = next((chart for chart in of if chart["title"] == title), None)
                parts.append(figure(found, result.panel.title))
            parts += [figure(None)] * (-len(results) % columns)
    parts.append("</div>")
    if any(maps):
        seeds = list(dict.fromkeys(seed for of in maps for chart in of for seed in chart["runs"]))
        options = "".join(f"<option>{escape(seed)}</option>" for seed in seeds)
        chosen = f"<label>seed <select id=seed>{options}</select></label>" if len(seeds) > 1 else ""
        parts += [
            "<h3>Every head</h3>",
            "<p class=note>Maximum logit of each head over the steps, layer by layer from the top. Blue is at or under "
            f"τ, yellow to red above it. {chosen}</p>",
        ]
        for result, of in zip(results, maps, strict=True):
            if len(results) > 1:
                parts.append(f"<h4>{escape(result.panel.heading)}</h4>")
            parts += ["<div class=grid>", *(figure(chart) for chart in of), "</div>"]
    return charts, "\n".join([*parts, "</section>"])


def _legend(results: Sequence[PanelResult], arms: Sequence[str], colours: Mapping[str, str]) -> str:
    """Buttons that hide and show an arm in all charts."""
    buttons = []
    for arm in arms:
        captions = dict.fromkeys(caption(r.panel, arm) for r in results if r.summaries.get(arm))
        label = next(iter(captions)) if len(captions) == 1 else appearance(results[0].panel)[arm].label
        buttons.append(
            f'<button type=button data-arm="{escape(arm)}" data-colour="{colours[arm]}" aria-pressed=true>'
            f"<i></i>{escape(label)}</button>"
        )
    seeds = max(len(runs) for result in results for runs in result.records.values())
    lines = "Thin lines are seeds, bold lines their mean. " if seeds > 1 else ""
    return (
        f'<div class="legend" role="group" aria-label="arms">{"".join(buttons)}</div>\n'
        f"<p class=note>{lines}A click on an arm hides it, a double click shows it alone. "
        "<span class=mouse>Drag in a chart to zoom, double-click to see all of it again.</span>"
        "<span class=touch>Pinch a chart to zoom, tap it twice to see all of it again.</span></p>\n"
        "<noscript><p>The charts need JavaScript.</p></noscript>"
    )


def _made(results: Sequence[PanelResult]) -> str:
    parts = ["<section>", "<h2>How it was made</h2>"]
    for result in results:
        panel, environment = result.panel, result.environment
        if len(results) > 1:
            parts.append(f"<h3>{escape(panel.heading)}</h3>")
        made = {"framework": FRAMEWORKS[panel.framework]}
        made |= {label: environment[name] for name, label in _MADE.items() if environment.get(name) is not None}
        data = panel.data
        made["data"] = f"{data.title}, {data.files} file{'s' if data.files != 1 else ''}, split {data.split}"
        made["data SHA-256"] = data.sha256
        rest = {name: value for name, value in environment.items() if name not in _MADE}
        parts.append(_definitions(made))
        settings = flat(panel.to_json()) | flat(rest)
        parts.append(f"<details><summary>All settings</summary>{_definitions(settings)}</details>")
    return "\n".join([*parts, "</section>"])


def _definitions(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in values.items())
    return f'<div class="wide"><table class=made><tbody>{rows}</tbody></table></div>'


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _json(value: Any) -> str:
    """For a script element, which any `</script` inside would end."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
