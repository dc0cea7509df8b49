"""The report says what its figures say, hides nothing, escapes everything, and fits a phone."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from forgeattention.tools.evaluation import page
from forgeattention.util.environment import environment

CHROMIUM = shutil.which("chromium")
SCRIPT = """
f.onload = () => {
  const d = f.contentDocument;
  const images = [...d.images].every(i => i.complete && i.naturalWidth > 100);
  const titles = d.querySelectorAll('h2').length;
  o.textContent = JSON.stringify({wide: d.documentElement.scrollWidth, images, titles});
};
"""


def cells(pairs, test="single"):
    return [
        {"test": test, "haystack": "licences", "length": 1000 * (i // 3 + 1), "depth": (0.1, 0.5, 0.9)[i % 3],
         "exact": exact, "packed": packed}
        for i, (exact, packed) in enumerate(pairs)
    ]  # fmt: skip


def result(pairs=(("PASS", "PASS"),) * 6, **changes):
    found = [a == "PASS" for a, _ in pairs]
    kept = sum(a == b == "PASS" for a, b in pairs)
    counts = {"exact_pass": sum(found), "packed_pass": kept, "kept": kept, "of": len(pairs)}
    return {
        "model": "smollm2 <b>",
        "preset": "balanced",
        "effective_bits": 3.1875,
        "niah": {"cells": cells(pairs), "tests": {"single": counts}, **counts},
        "kl": [
            {"preset": name, "bits": bits, "kl": kl, "same_top": 0.97, "perplexity": 11.2, "exact_perplexity": 11.1,
             "positions": 1024, "text": "genesis"}
            for name, bits, kl in (("small", 2.2, 0.02), ("balanced", 3.1875, 0.0049), ("fidelity", 3.7, 0.002))
        ],
        "memory": [{"context": n, "exact": 23040 * n, "packed": 5000 * n} for n in (512, 4096)],
        "speed": [{"context": n, "exact": 20.0, "packed": 25.0} for n in (512, 4096)],
        "ruler": [{"task": "vt", "length": 4096, "exact": 40.0, "packed": 38.5, "texts": ["a", "b"]}],
        "env": environment(),
        **changes,
    }  # fmt: skip


def test_the_verdict_is_in_the_figures():
    assert page.verdict(result()) == (
        "At 4,096 tokens the packed cache (3.19 bits per element) takes 4.6x less memory than the exact one; keeps all "
        "the 6 needles (of 6) that the exact cache finds; bends predictions by 0.0049 nats and leaves 97.0% of the top "
        "tokens; decodes 1.25x as fast as the exact one at 4,096 tokens."
    )


def test_lost_needles_are_said():
    lost = [("PASS", "PASS"), ("PASS", "PARTIAL_WORD"), ("FAIL", "PASS"), ("FAIL", "FAIL")]
    text = page.verdict(result(lost))
    assert "keeps 1 of the 2 needles (of 4) that the exact cache finds" in text
    filled, _ = page.render(result(lost))
    for kind, said in (("PASS", "PASS"), ("LOST", "PARTIAL_WORD"), ("ONLY", "PASS"), ("NEITHER", "FAIL")):
        assert f"<td class='{kind}'>{said}</td>" in filled
    assert "finds none of 2 needles even with the exact cache" in page.verdict(result([("FAIL", "PASS")] * 2))


def test_the_page_needs_nothing_else_and_holds_the_figures():
    filled, charts = page.render(result())
    assert set(charts) == {"kl", "memory", "speed"}
    assert all(png.startswith(b"\x89PNG") for png in charts.values())
    assert not re.search(r"(src|href)=[\"'](?!data:)", filled)
    assert "<script" not in filled
    assert "smollm2 &lt;b&gt;" in filled
    for figure in ("0.0049", "3.188", "94,371,840", "38.50", "RULER"):
        assert figure in filled
    assert "['a', 'b']" not in filled


def test_parts_that_were_not_measured_are_left_out():
    bare = {key: result()[key] for key in ("model", "preset", "effective_bits", "env")}
    filled, charts = page.render(bare)
    assert charts == {}
    assert page.verdict(bare) == "The packed cache takes 3.19 bits per element."
    for title in ("Needles", "Fidelity", "Memory", "Speed", "Sparse", "Eviction"):
        assert f"<h2>{title}" not in filled


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "name"), [(360, "phone"), (1200, "desk"), (700, "paper")])
def test_the_page_fits(tmp_path, width, name):
    filled, _ = page.render(result([("PASS", "PARTIAL_NUMBER")] * 36))
    if name == "paper":
        # The rules of print on a frame as wide as A4 without its margins, where nothing can be scrolled.
        filled = filled.replace("@media print", "@media all")
    artefacts = Path(os.environ.get("FORGEATTENTION_ARTEFACTS", tmp_path))
    artefacts.mkdir(parents=True, exist_ok=True)
    # A frame, because a window of chromium is never as narrow as a phone.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<body style='margin:0'><iframe id=f width={width} height=4000 style='border:0' "
        f"srcdoc='{html.escape(filled)}'></iframe><pre id=o></pre><script>{SCRIPT}</script>",
        encoding="utf-8",
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    seen = json.loads(html.unescape(re.search(r'<pre id="o">(.*?)</pre>', done.stdout)[1]))
    assert seen == {"wide": width, "images": True, "titles": 6}
    shot = artefacts / f"report-{name}.png"
    subprocess.run(
        [CHROMIUM, *options, f"--window-size={max(width, 500)},2600", f"--screenshot={shot}", outer.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert shot.stat().st_size > 20000
