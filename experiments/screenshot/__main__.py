"""A picture of a run's report page, as the README shows it. Needs Chromium and the extra `test`.

python -m experiments.screenshot runs/llama docs/report.png
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from llmbo.report.page import render_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900, help="0 takes the whole page")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("No Chromium here; on Debian: apt-get install chromium")
    report = json.loads((arguments.run / "report.json").read_text(encoding="utf-8"))
    page = render_page([(str(arguments.run), report)])
    photograph(browser, page, arguments.out, arguments.width, arguments.height, arguments.dark)


def photograph(browser: str, page: str, out: Path, width: int, height: int, dark: bool) -> None:
    """Open the page from a file, as a user would, and save what is seen."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        file.write_text(page, encoding="utf-8")
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = chromium.new_page(
            viewport={"width": width, "height": height or 900}, color_scheme="dark" if dark else "light"
        )
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-ready=yes]")
        tab.screenshot(path=out, full_page=height == 0)
        chromium.close()


if __name__ == "__main__":
    main()
