"""The report as one HTML file that opens offline: figures to explore, tables, and where it all comes from."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from capgap.files import atomic_file
from capgap.report.interactive import PlotlyFigure
from capgap.report.rows import Row


@dataclass(frozen=True)
class Figure:
    """A figure of the page, its title and a line below it."""

    title: str
    figure: PlotlyFigure
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page; every row has the same keys, which are its heads."""

    title: str
    rows: Sequence[Row]
    caption: str = ""


def write_page(
    path: Path, *, title: str, lead: str, statements: Sequence[str], sections: Sequence[Figure | Table]
) -> Path:
    """Writes one HTML file, whole or not at all.

    The file asks nothing of any network: plotly.js stands in it once, and its content security policy forbids
    requests. All text is escaped.

    Args:
        path: the file.
        title: also the document's title.
        lead: one sentence below the title, such as the law.
        statements: what was and was not measured.
        sections: figures and tables, in order.
    Returns: `path`.
    """
    body, scripts = [], []
    for section in sections:
        heading = f"<h2>{escape(section.title)}</h2>"
        caption = f"<p class=caption>{escape(section.caption)}</p>" if section.caption else ""
        if isinstance(section, Table):
            body.append(f"<section>{heading}{_table(section.rows)}{caption}</section>")
        else:
            name = f"figure-{len(scripts)}"
            height = int(section.figure["layout"].get("height", 380))
            box = f'<div class="figure" id="{name}" style="height:{height}px"></div>'
            body.append(f"<section>{heading}{box}{caption}</section>")
            scripts.append(f"draw({_json(name)}, {_json(section.figure)});")
    said = "".join(f"<li>{escape(line)}</li>" for line in statements)
    parts = {
        "title": escape(title),
        "lead": escape(lead),
        "statements": said,
        "body": "\n".join(body),
        "plotly": get_plotlyjs().replace("</script", "<\\/script"),
        "scripts": "\n".join(scripts),
    }
    # One pass, so that a mark inside a title is text and nothing else.
    html = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _PAGE)
    with atomic_file(Path(path)) as beside:
        beside.write_text(html, encoding="utf-8")
    return Path(path)


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return "<p class=caption>nothing to show</p>"
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in rows[0])
    lines = []
    for row in rows:
        cells = "".join(f"<td{_number(value)}>{escape(value)}</td>" for value in row.values())
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _number(text: str) -> str:
    plain = text.replace(",", "").replace("−", "-")
    try:
        float(plain)
    except ValueError:
        return ""
    return " class=number"


def _json(value: object) -> str:
    """JSON that can stand inside a script element, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'">
<link rel="icon" href="data:,">
<title>{{title}}</title>
<style>
:root { --ink: #1f2430; --soft: #5b6472; --faint: #e3e6eb; --blue: #0072b2; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.1rem; margin: 0 0 10px; }
.lead { font-size: 1.1rem; color: var(--soft); margin: 0 0 20px; overflow-wrap: anywhere; }
section, .box { background: #fff; border: 1px solid var(--faint); border-radius: 10px; padding: 18px;
  margin: 0 0 16px; }
.box { border-left: 5px solid var(--blue); }
.box ul { margin: 0; padding-left: 20px; }
.box li { margin: 3px 0; overflow-wrap: anywhere; }
.caption { color: var(--soft); font-size: 0.9rem; margin: 10px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--faint);
  vertical-align: top; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td.number { text-align: right; }
tbody tr:hover { background: #f6f9fc; }
.figure { width: 100%; }
@media (max-width: 600px) {
  main { padding: 18px 8px 40px; } section, .box { padding: 12px; } h1 { font-size: 1.5rem; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{title}}</h1>
<p class="lead">{{lead}}</p>
<div class="box"><h2>What was and what was not measured</h2><ul>{{statements}}</ul></div>
<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>
{{body}}
</main>
<script>{{plotly}}</script>
<script>
function draw(name, figure) {
  Plotly.newPlot(name, figure.data, figure.layout,
    {responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d",
    "select2d"]});
}
{{scripts}}
</script>
</body>
</html>
"""
