"""The picture of the report page in the documentation: a run of the cloud preset, in Chromium."""

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

BUDGET = "blackout=50ms,devices/RESTORE=5ms"
PICTURE = Path(__file__).parent / "report-page.png"

with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
    run, page = Path(directory, "run.json"), Path(directory, "page.html")
    luo = (sys.executable, "-P", "-m", "luo")
    # Whatever the verdict is: the page shows it.
    subprocess.run([*luo, "run", "--preset", "cloud", "--budget", BUDGET, "--json", run])
    subprocess.run([*luo, "report", run, "-o", page], check=True)
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
    view = browser.new_page(viewport={"width": 1200, "height": 1500}, color_scheme="light")
    view.goto(page.as_uri())
    view.wait_for_timeout(1000)  # until the drawings are there
    view.screenshot(path=PICTURE)
    browser.close()
