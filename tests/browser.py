"""Headless Chromium: open a page from disk, run a script in it, and see what it logs."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--mute-audio", "--autoplay-policy=no-user-gesture-required",
    "--enable-logging=stderr", "--dump-dom",
]  # fmt: skip
PROBE = """
<pre id="probe"></pre><script>
(async () => {{
  const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const look = async () => {{ {script} }};
  let found;
  try {{ found = await look(); }} catch (error) {{ console.error(error.stack); }}
  document.querySelector("#probe").textContent = JSON.stringify(found);
}})();
</script></body>"""


def in_every_look(test: Any) -> Any:
    """Run a test in light and dark, on a wide window and on a phone's."""
    test = pytest.mark.parametrize("size", ["1280,900", "390,800"], ids=["wide", "phone"])(test)
    return pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])(test)


class Opened(NamedTuple):
    console: list[str]
    """Lines of the console: errors, warnings, and messages of the browser about the page."""
    found: Any
    """What the script returned."""


def open_page(
    page: Path, folder: Path, script: str = "", *, size: str = "1280,900", dark: bool = False, seconds: int = 4
) -> Opened:
    """Open a copy of a page and run `script`, the body of an async function, in it.

    The clock of the page runs ahead whenever its scripts wait, and stops after `seconds`. Decoding audio does not hold
    it up, so scripts that wait for audio need many seconds on a busy machine.
    """
    assert CHROMIUM is not None
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    copy = folder / "probe.html"
    copy.write_text(text.replace("</body>", PROBE.format(script=script)), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *FLAGS, scheme, f"--user-data-dir={folder / 'profile'}", f"--window-size={size}"]
    command.append(f"--virtual-time-budget={1000 * seconds}")
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Opened(console, json.loads(html.unescape(match[1])) if match[1] not in ("", "undefined") else None)
