"""Holds the style of a report: colours for light and dark, type, tables, and how it is printed.

Every rule is inside of `.gs-report`, so that a notebook around a report keeps its own style.
"""

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f7f9",
    "ink": "#171c22",
    "muted": "#56606b",
    "line": "#dde2e8",
    "before": "#838c97",
    "after": "#0a63c2",
    "local": "#b34a00",
    "clip": "#f4d9c6",
    "area": "#8fb8e8",
    "code": "#eef1f4",
    "h0": "#eef2f6",
    "h1": "#fbe3c2",
    "h2": "#f6c48b",
    "h3": "#ec9a55",
    "h4": "#b8500f",
    "h5": "#7a2c00",
    "ih0": "#171c22",
    "ih1": "#171c22",
    "ih2": "#171c22",
    "ih3": "#171c22",
    "ih4": "#ffffff",
    "ih5": "#ffffff",
    "b0": "#eef2f6",
    "b1": "#d5e5f7",
    "b2": "#a9cbf0",
    "b3": "#6ba6e3",
    "b4": "#0a63c2",
    "b5": "#083a73",
    "ib0": "#171c22",
    "ib1": "#171c22",
    "ib2": "#171c22",
    "ib3": "#0b1520",
    "ib4": "#ffffff",
    "ib5": "#ffffff",
    "s0": "#0a63c2",
    "s1": "#5fa3e6",
    "s2": "#b34a00",
    "s3": "#e39a3b",
    "s4": "#5b4a9c",
    "s5": "#838c97",
    "k0": "#ffffff",
    "k1": "#0b1520",
    "k2": "#ffffff",
    "k3": "#0b1520",
    "k4": "#ffffff",
    "k5": "#0b1520",
}
DARK = {
    "paper": "#12161b",
    "panel": "#1a2027",
    "ink": "#e6eaee",
    "muted": "#a3adb8",
    "line": "#323b45",
    "before": "#848e99",
    "after": "#5aa5f5",
    "local": "#f09a56",
    "clip": "#4a2f1e",
    "area": "#35639a",
    "code": "#222a33",
    "h0": "#232b34",
    "h1": "#3d2d1f",
    "h2": "#643c1a",
    "h3": "#935015",
    "h4": "#d98a3d",
    "h5": "#ffc98a",
    "ih0": "#e6eaee",
    "ih1": "#e6eaee",
    "ih2": "#f3f5f7",
    "ih3": "#ffffff",
    "ih4": "#12161b",
    "ih5": "#12161b",
    "b0": "#1f2830",
    "b1": "#1c3450",
    "b2": "#1f4a7a",
    "b3": "#2f6db5",
    "b4": "#5aa5f5",
    "b5": "#b5d6fb",
    "ib0": "#e6eaee",
    "ib1": "#e6eaee",
    "ib2": "#f3f5f7",
    "ib3": "#ffffff",
    "ib4": "#0b1520",
    "ib5": "#0b1520",
    "s0": "#5aa5f5",
    "s1": "#2f6db5",
    "s2": "#f09a56",
    "s3": "#9a5a1e",
    "s4": "#b7a6f2",
    "s5": "#848e99",
    "k0": "#0b1520",
    "k1": "#ffffff",
    "k2": "#0b1520",
    "k3": "#ffffff",
    "k4": "#0b1520",
    "k5": "#0b1520",
}

RULES = """
.gs-report{background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;text-align:left;overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
.gs-report .page{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.gs-report p{margin:0 0 .75rem;max-width:46rem}
.gs-report .over{color:var(--muted);font-size:.8125rem;margin:0 0 .25rem}
.gs-report h1{font-size:2.125rem;line-height:1.2;font-weight:680;letter-spacing:-.015em;margin:0 0 .75rem}
.gs-report .verdict{font-size:1.25rem;line-height:1.5;max-width:50rem;margin:0}
.gs-report h1,.gs-report h2{color:inherit}
.gs-report section{margin-top:3rem;padding-top:1.25rem;border-top:1px solid var(--line)}
.gs-report h2{font-size:1.375rem;line-height:1.3;font-weight:650;letter-spacing:-.01em;margin:0 0 .5rem}
.gs-report .shown{margin:1.25rem 0 1.75rem}
.gs-report figure{margin:0}
.gs-report figcaption{color:var(--muted);font-size:.875rem;margin:.25rem 0 .5rem;max-width:46rem}
.gs-report .note{color:var(--muted);font-size:.875rem;margin-top:.75rem}
.gs-report .scroll{overflow-x:auto}
.gs-report svg{display:block;width:100%;min-width:40rem;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
.gs-report svg.small,.gs-report svg.pair{min-width:0}
.gs-report svg.pair{max-width:15rem}
.gs-report .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:1rem;margin:1rem 0 1.5rem}
.gs-report .tile{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:1rem 1.125rem}
.gs-report .big{font-size:1.5rem;line-height:1.25;font-weight:650;letter-spacing:-.01em;margin:0 0 .5rem}
.gs-report .smalls{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1.25rem 1.5rem;
margin:1.25rem 0}
.gs-report .smalls figcaption{color:var(--ink);margin:0}
.gs-report .smalls p{color:var(--muted);font-size:.8125rem;margin:0}
.gs-report .smalls code{background:none;padding:0;font-size:.75rem}
.gs-report table{border-collapse:collapse;table-layout:auto;width:100%;margin:0;font-size:.875rem;line-height:1.4;
font-variant-numeric:tabular-nums;border:0}
.gs-report caption{text-align:left;color:var(--muted);font-size:.8125rem;padding:.25rem 0 .5rem;caption-side:top}
.gs-report details caption{position:absolute;width:1px;height:1px;padding:0;overflow:hidden;clip-path:inset(50%)}
.gs-report th,.gs-report td{padding:.375rem .75rem .375rem 0;border:0;border-bottom:1px solid var(--line);
background:none;color:inherit;vertical-align:baseline;text-align:right;font-weight:400;white-space:nowrap}
.gs-report tbody tr:nth-child(n){background:none}
.gs-report tr>*:last-child{padding-right:.25rem}
.gs-report thead th{color:var(--muted);font-weight:600;border-bottom:1px solid var(--muted)}
.gs-report th[scope=row],.gs-report thead th:not(.n),.gs-report td.w{text-align:left}
.gs-report th[scope=row]{white-space:normal;min-width:9rem}
.gs-report thead th,.gs-report td.w{white-space:normal;overflow-wrap:normal}
.gs-report .heat td{padding:0 .25rem .25rem 0;border:0}
.gs-report .heat th[scope=row]{border:0;padding:.125rem .75rem .125rem 0;
font:.8125rem ui-monospace,Menlo,Consolas,monospace}
.gs-report .heat td span{display:block;padding:.1875rem .5rem;border-radius:.1875rem}
.gs-report details{margin:.25rem 0}
.gs-report summary{cursor:pointer;color:var(--after);font-size:.875rem;padding:.25rem 0}
.gs-report summary:focus-visible,.gs-report pre:focus-visible{outline:2px solid var(--after);outline-offset:2px}
.gs-report code,.gs-report pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.gs-report code{font-size:.875em;background:none;color:inherit}
.gs-report pre{background:var(--code);color:var(--ink);border-radius:.375rem;padding:.75rem 1rem;margin:.5rem 0;
font-size:.875rem;line-height:1.5;overflow-x:auto;white-space:pre-wrap;user-select:all}
.gs-report ol.advice{padding-left:1.5rem;margin:0}
.gs-report .advice li{margin:0 0 1.5rem;padding-left:.25rem}
.gs-report .advice p{margin:0 0 .375rem}
.gs-report .tried{border-left:3px solid var(--after);padding-left:.75rem}
.gs-report .legend{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;font-size:.875rem;margin:0 0 .5rem}
.gs-report .sign{font-size:.75rem}
.gs-report .sign.a{color:var(--after)}
.gs-report .sign.b{color:var(--local)}
.gs-report dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem;margin:0 0 1rem;font-size:.875rem}
.gs-report dt{color:var(--muted)}
.gs-report dd{margin:0}
.gs-report .t,.gs-report .n,.gs-report .m{fill:var(--muted)}
.gs-report text.n{font-variant-numeric:tabular-nums;font-size:11.5px}
.gs-report .m{fill:var(--ink);font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.gs-report .rule{stroke:var(--line);fill:none}
.gs-report .axis{stroke:var(--muted);fill:none}
.gs-report .f0{fill:var(--before)}
.gs-report .f1{fill:var(--after)}
.gs-report .columns rect{shape-rendering:crispEdges}
.gs-report .act{stroke:var(--ink);stroke-width:2;fill:none}
.gs-report .line{fill:none;stroke-width:1.75;stroke-linejoin:round}
.gs-report .line.a{stroke:var(--after)}
.gs-report .line.c{stroke:var(--area);stroke-width:1}
.gs-report .line.b{stroke:var(--local);stroke-dasharray:5 3}
.gs-report .dot.a{fill:var(--after)}
.gs-report .dot.b{fill:var(--local)}
.gs-report .cross{stroke:var(--ink);stroke-width:2;fill:none}
.gs-report .hover{fill:transparent}
.gs-report .hover:hover{fill:var(--muted);fill-opacity:.15}
.gs-report .area{fill:var(--area)}
.gs-report .rug{stroke:var(--ink);stroke-width:1;fill:none}
.gs-report .edge{stroke:var(--local);stroke-width:1.5;stroke-dasharray:4 2;fill:none}
.gs-report .clip{fill:var(--clip);fill-opacity:.75}
"""

NARROW = """
.gs-report .page{padding:1.25rem 1rem 2rem}
.gs-report h1{font-size:1.625rem}
.gs-report td{white-space:normal}
.gs-report .verdict{font-size:1.125rem}
"""

PRINT = """
.gs-report{font-size:10pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.gs-report .page{max-width:none;padding:0}
.gs-report h1,.gs-report h2{color:inherit}
.gs-report section{margin-top:1.5rem}
.gs-report figure,.gs-report .tile,.gs-report tr,.gs-report li,.gs-report pre{break-inside:avoid}
.gs-report h2,.gs-report caption,.gs-report summary,.gs-report figcaption{break-after:avoid}
.gs-report p{break-inside:avoid}
.gs-report .legend,.gs-report figcaption{break-before:avoid}
.gs-report .heat th[scope=row]{font-size:7.5pt}
.gs-report section>p,.gs-report .legend{break-after:avoid}
.gs-report .tiles{grid-template-columns:repeat(3,1fr)}
.gs-report .smalls{grid-template-columns:repeat(3,1fr);gap:.75rem 1.25rem}
.gs-report thead{display:table-header-group}
.gs-report .scroll{overflow:visible}
.gs-report svg{min-width:0;break-inside:avoid}
.gs-report table{font-size:8pt}
.gs-report details:not(.long)::details-content{content-visibility:visible;display:block;block-size:auto}
.gs-report details:not(.long) summary{color:var(--muted);list-style:none}
"""


def style() -> str:
    """Returns the style of a report."""
    steps = "".join(
        f".gs-report rect.{c}{{fill:var(--{c})}}\n.gs-report span.{c}{{background:var(--{c});color:var(--i{c})}}\n"
        f".gs-report .i{c}{{fill:var(--i{c});font-size:11px}}\n"
        for c in (f"{kind}{i}" for kind in "hb" for i in range(6))
    )
    steps += "".join(
        f".gs-report .s{i}{{fill:var(--s{i})}}\n.gs-report .g{i}{{color:var(--s{i})}}\n"
        f".gs-report .k{i}{{fill:var(--k{i})}}\n"
        for i in range(6)
    )
    return (
        f".gs-report{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{\n.gs-report{{{_variables(DARK)}}}\n}}\n"
        f"{RULES.strip()}\n{steps}"
        f"@media screen and (max-width:40rem){{{NARROW}}}\n"
        f"@media print{{{PRINT}}}\n"
    )


def _variables(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colours.items())
