"""A page in headless Chromium, opened from its file as by a user."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")


def opened(page: Path, fragment: str = "", width: int = 1400) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what the console got: messages, and errors of the page's policy."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        ended = subprocess.run(
            [
                *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
                *(
                    "--enable-logging=stderr",
                    "--virtual-time-budget=10000",
                    f"--window-size={width},1000",
                    "--dump-dom",
                ),
                page.resolve().as_uri() + fragment,
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    return ended.stdout, re.findall(r"^.*:CONSOLE.*$", ended.stderr, re.MULTILINE)


def driven(page: Path, script: str, fragment: str = "") -> tuple[str, list[str]]:
    """The same page with a script of the test behind its own, which its policy would not let run."""
    html = page.read_text()
    loosened = re.sub(r"script-src [^\">]*", "script-src &#39;unsafe-inline&#39;", html, count=1)
    assert loosened != html
    page = page.with_name(f"driven_{page.name}")
    page.write_text(loosened.replace("</body>", f"<script>{script}</script></body>"))
    return opened(page, fragment)
