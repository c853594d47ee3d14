"""What all pages share: one self-contained HTML file, light and dark, that works offline."""

from __future__ import annotations

from html import escape

from pmpo_megatron.monitor.style import DARK, LIGHT, css_variables

COLORS = f"""
:root {{ color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", sans-serif;
  --page: #f5f5f2; --card: #ffffff; --ink: #1c1c1a; --muted: #6a6a66; --grid: #e4e4df; {css_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{
  --page: #161615; --card: #20201f; --ink: #ecece8; --muted: #a3a39d; --grid: #383836; {css_variables(DARK)} }} }}"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{colors}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 1180px; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 var(--font) }}
h1 {{ margin: 0; font-size: 1.6rem }} h2 {{ margin: 2.2rem 0 .8rem; font-size: 1.15rem }} p.note {{ color: var(--muted) }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem }}
.card {{ background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: .8rem; overflow-x: auto }}
.card svg {{ width: 100%; height: auto; display: block }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--grid); vertical-align: top }}
th {{ color: var(--muted); font-weight: 600 }} td.n, th.n {{ text-align: right }}
.dot {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }}
details {{ margin: .4rem 0 }} summary {{ cursor: pointer }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font-size: 13px }} .label {{ color: var(--muted) }}
</style></head><body>
<h1>{title}</h1><p class="note">{subtitle}</p>
{body}
</body></html>
"""


def page(title: str, subtitle: str, body: str) -> str:
    """The page as text; ``body`` is HTML, the others are plain text."""
    return PAGE.format(title=escape(title), subtitle=escape(subtitle), body=body, colors=COLORS)


def picture_file(svg: str) -> str:
    """A page's picture ``svg`` as the text of a file of its own, for a document that shows it."""
    svg = svg.replace("<svg ", '<svg style="background: var(--card)" ', 1)
    return svg.replace(">", f"><style>{COLORS}</style>", 1)
