"""`forgeattn bench report`: the records of `forgeattn bench decode` as one HTML page."""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from typing import Any

from ...util.files import read_json

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; }}
caption {{ text-align: left; padding-bottom: .5rem; }}
.bar {{ display: inline-block; height: .7em; background: #3a7; }}
.peer {{ background: #999; }}
.bars td {{ text-align: left; white-space: nowrap; }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<table><caption>Attention of one new token: medians, lower is better; memory of one layer's cache</caption>
<tr>{head}</tr>
{rows}
</table>
<h2>Time in microseconds</h2>
<table class="bars">
{bars}
</table>
</html>
"""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the page of `args.records`, a file of `forgeattn bench decode --json`, to `args.output`."""
    records = read_json(args.records, "bench", "the records of `forgeattn bench decode`")
    output = Path(args.output)
    output.write_text(page(records))
    print(output)
    return {"records": str(args.records), "output": str(output)}


def page(records: list[dict[str, Any]]) -> str:
    """The page.

    Args:
        records: as `bench.decode` and `bench_mlx.decode` return them, `env` first.

    Raises:
        ValueError: other records, or none.
    """
    try:
        return _page(records)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"[bench] expected the records of `forgeattn bench decode`; got others ({type(error).__name__}: {error})"
        ) from None


def _page(records: list[dict[str, Any]]) -> str:
    measured = [r for r in records if r.get("op") == "decode_attention"]
    if not measured or records[0]["op"] != "env":
        raise ValueError("[bench] expected the records of `forgeattn bench decode`; got others")
    env = records[0]["env"]
    machine = env.get("device") or env["processor"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    peers = list(dict.fromkeys(name for r in measured for name in r["peers_us"]))
    sized = list(dict.fromkeys(name for r in measured for name in r.get("peers_bytes", {})))
    head = [
        "batch",
        "context",
        "bits",
        "ours us",
        "GB/s",
        "of limit",
        *(f"{p} us" for p in peers),
        "ratio",
        "MB",
        *(f"{p} MB" for p in sized),
        *(["tokens/s"] if any("tokens_per_s" in r for r in measured) else []),
        "error",
    ]
    rows = []
    for r in measured:
        times = [f"{r['peers_us'][p]:.0f}" if p in r["peers_us"] else "" for p in peers]
        rows.append(
            [
                str(r["shape"]["batch"]),
                str(r["shape"]["context"]),
                f"{r['effective_bits']:.2f}",
                f"{r['us']:.0f}",
                f"{r['gb_s']:.0f}",
                f"{r['share_of_copy']:.2f}",
                *times,
                f"{r['ratio']:.2f}",
                f"{r['packed_bytes'] / 1e6:.1f}",
                *(f"{r['peers_bytes'][p] / 1e6:.1f}" if p in r.get("peers_bytes", {}) else "" for p in sized),
                *([f"{r['tokens_per_s']:.0f}"] if "tokens_per_s" in r else []),
                f"{r['rel_error']:.1e}",
            ]
        )
    title = f"Decode attention on {machine}"
    about = f"{env['machine']}; {versions}; commit {env.get('commit') or 'unknown'}; codec {env['spec']}"
    return PAGE.format(
        title=html.escape(title),
        about=html.escape(about),
        head="".join(f"<th>{html.escape(name)}</th>" for name in head),
        rows="\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows),
        bars="\n".join(_bars(r) for r in measured),
    )


def _bars(r: dict[str, Any]) -> str:
    times = {"ours": r["us"], **r["peers_us"]}
    longest = max(times.values())
    lines = []
    for name, us in times.items():
        label = html.escape(f"{r['shape']['batch']} x {r['shape']['context']} {name}")
        kind = "bar" if name == "ours" else "bar peer"
        bar = f'<span class="{kind}" style="width:{us / longest * 30:.2f}rem"></span>'
        lines.append(f"<tr><td>{label}</td><td>{bar} {us:.0f}</td></tr>")
    return "\n".join(lines)
