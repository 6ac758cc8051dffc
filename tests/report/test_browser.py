"""The page in a real browser that reaches no network."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from capgap import records
from capgap.report import write_report

NANO = Path(__file__).parents[2] / "studies" / "nano" / "records.jsonl"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(page, profile):
    """The document as the browser has it after its scripts ran, and what it logged."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000",
            "--enable-logging=stderr", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=True, env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH, as from the package chromium")
def test_the_nano_studys_report_opens_offline_and_draws_every_figure(tmp_path):
    report = write_report(records.read(NANO), tmp_path / "report", title="The nano study")
    document, said = opened(report.page, tmp_path)
    assert said == []
    figures = re.findall(r'<div class="figure[^"]*" id="figure-\d+"', document)
    assert len(figures) >= 8
    parts = re.split(r'<div class="figure[^"]*" id="figure-\d+"', document)[1:]
    assert all('class="main-svg"' in part for part in parts)
    assert "The nano study" in document


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH, as from the package chromium")
def test_a_script_that_fails_would_be_seen(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<script>throw new Error('broken')</script>")
    _, said = opened(page, tmp_path / "profile")
    assert any("broken" in line for line in said)
