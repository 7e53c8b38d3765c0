"""A benchmark as one HTML page: nothing is loaded from elsewhere, light and dark, readable on a phone.

The table's lines become cards where the screen is narrow. The figures are SVG within the page, their words in the
page's own colour and font.
"""

import html
import io
import re
from pathlib import Path
from typing import Any

from training.benchmark import figures, table
from training.benchmark.results import Results

TEMPLATE = Path(__file__).with_name("report.html")
TITLES = {
    "throughput": "Tokens a second",
    "losses": "Loss",
    "memory": "Memory of the rank that has most",
    "step": "Where a step's time goes",
}
INK = "#010203"  # what is drawn in it becomes the colour of the page's text
FOR_THE_PAGE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 11,
}
FOR_THE_PAGE |= {f"{name}.color": INK for name in ("text", "xtick", "ytick")}
FOR_THE_PAGE |= {"axes.labelcolor": INK, "axes.edgecolor": "#888888"}


def page(results: Results) -> str:
    about, rows = results["environment"], results["rows"]
    facts = {
        "device": f"{about['device']}, {results['dtype']}",
        "model": f"{max(row.get('parameter_count', 0) for row in rows):,} parameters",
        "measured": f"{results['steps']} steps, rounds: {results['rounds']}; {about['started'][:10]}",
        "versions": f"PyTorch {about['torch']}, DeepSpeed {about['deepspeed']}, Python {about['python']}",
        "code": (about["git_commit"] or "unknown")[:12] + " with changes" * about["git_changes"],
        "settings": " ".join(results["arguments"]),
    }
    if facts["model"].startswith("0 "):
        del facts["model"]  # without the probe, nobody has counted
    filled = {
        "facts": "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()),
        "summary": html.escape(summary(results)),
        "table": of_table(results["rows"]),
        "figures": "".join(drawn(rows)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], TEMPLATE.read_text())


def summary(results: Results) -> str:
    """One sentence: what worked, and whether it trained alike."""
    rows = results["rows"]
    worked = [row for row in rows if row["status"] == "ok"]
    compared = [row for row in worked if "loss_difference" in row and row["verdict"] != "baseline"]
    text = f"{len(worked)} of {len(rows)} ran to their end."
    if compared:
        same = sum(row["verdict"] != "DIFFERS" for row in compared)
        largest = max(row["loss_difference"] for row in compared)
        base = next(row["strategy"] for row in rows if row.get("verdict") == "baseline")
        text += f" {same} of {len(compared)} have the loss of {base}; the largest difference is {largest:.1e}."
    return text


def of_table(rows: list[table.Row]) -> str:
    """Every cell carries its column's name, which a card shows beside it."""
    found = table.columns(rows)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in found)
    lines = []
    for row, cells in zip(rows, zip(*found.values(), strict=True), strict=True):
        named = list(zip(found, map(html.escape, cells), strict=True))
        line = f'<th scope="row">{named[0][1]}</th>'
        line += "".join(f'<td data-name="{html.escape(name)}">{cell}</td>' for name, cell in named[1:])
        if row["status"] != "ok":
            why = html.escape(f"{row['status']}: {row['error']}")
            line += f'</tr><tr class="why"><td colspan="{len(named)}">{why}</td>'
        lines.append(f'<tr class="{"bad" if row.get("verdict") == "DIFFERS" else ""}">{line}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def drawn(rows: list[table.Row]) -> list[str]:
    import matplotlib  # not before it is wanted: it costs half a second

    with matplotlib.rc_context(FOR_THE_PAGE):
        return [
            f"<figure><figcaption>{TITLES[name]}</figcaption>{inline(figure, name)}</figure>"
            for name, figure in figures.all_of(rows).items()
        ]


def inline(figure: "figures.Figure", name: str) -> str:
    """As SVG that can stand in a page beside others: ids of its own, as wide as its place."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("#222222", "currentColor")
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{TITLES[name]}" ', 1)


def write(results: Results, path: Path) -> None:
    path.write_text(page(results), encoding="utf-8")
