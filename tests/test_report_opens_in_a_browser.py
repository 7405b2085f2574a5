"""report.html opens in Chromium without an error on its console, and with every picture in it."""

import json
import re
import shutil
import subprocess

import pytest

import train
from tests.forks import script

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
SAY = (
    "<script>onload = () => document.title = "
    "JSON.stringify([...document.images].map(i => i.complete && i.naturalWidth))"
    "</script>"
)


def opened(path):
    """(the document after loading, what it wrote to the console)."""
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom".split()
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={path.parent}/profile", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.chromium
@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_report_opens(toy, tmp_path):
    train.train(train.Config(**toy))
    assert script("eval.py", toy["out_dir"]).returncode == 0
    page = open(f"{toy['out_dir']}/report.html", encoding="utf-8").read()
    (tmp_path / "page.html").write_text(page.replace("</html>", SAY + "</html>"), encoding="utf-8")
    document, errors = opened(tmp_path / "page.html")
    widths = json.loads(re.search("<title>(.*)</title>", document)[1])
    assert len(widths) == page.count("<img") >= 4 and all(w > 100 for w in widths)
    assert not errors
    (tmp_path / "page.html").write_text(
        page.replace("</html>", "<script>throw Error('seen')</script></html>")
    )
    assert any("seen" in e for e in opened(tmp_path / "page.html")[1])  # an error would have been
