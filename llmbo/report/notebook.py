"""A report -> what a notebook shows of it: the picture and the table of the front."""

import base64
import html

from llmbo.report.picture import draw_front
from llmbo.report.schema import Report
from llmbo.report.table import front_rows


def run_html(folder: str, report: Report) -> str:
    """Self-contained HTML. Whatever a report holds is untrusted, so all of it is escaped."""
    picture = base64.b64encode(draw_front(report)["front.png"]).decode()
    headings, rows = front_rows([(folder, report.model_dump())], [report.run.name])
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    return (
        f'<img src="data:image/png;base64,{picture}" style="max-width: 100%" '
        f'alt="Pareto front of {html.escape(report.run.name, quote=True)}">'
        f'<div style="max-height: 24em; overflow: auto"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in cells)}</tbody></table></div>"
    )
