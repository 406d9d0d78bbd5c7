"""The page in headless Chromium, used as a person would; a word in the console fails the test.

Screenshots of every state go to the folder $ONEVOICE_SCREENSHOTS, or to the temporary folder of the tests.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_browser
from extraction.test_stream import EXTRACTOR
from server.conftest import RATE, serving
from voices import Voice

from onevoice.audio import read_audio, write_audio
from onevoice.extraction.enrollment import enroll_files
from onevoice.extraction.extractor import Extractor
from onevoice.server.service import Service, open_service
from onevoice.server.settings import Settings

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--mute-audio",
    "--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser whose microphone hears a toy voice."""
    sound = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    write_audio(sound, Voice.number(0).say(3, 5.0, 48_000), 48_000)
    with playwright.sync_playwright() as driver:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={sound}"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


class Tab:
    """A page, what it logged, and pictures of it."""

    def __init__(self, browser: Any, address: str, shots: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.shots, self.name = shots, options.get("color_scheme", "light")
        self.words: list[str] = []
        self.page.on("console", lambda message: self.words.append(message.text))
        self.page.on("pageerror", lambda error: self.words.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#work:not([hidden]), #live:not([hidden]), #sign-in:not([hidden])")

    def shoot(self, state: str) -> None:
        """Keep a picture of a state; nothing may stick out of the window."""
        assert self.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, state
        self.page.screenshot(path=self.shots / f"{self.name}-{state}.png", full_page=True)

    def shoot_twice(self, state: str) -> None:
        """Keep a picture of a wide and light window, and one of a dark phone."""
        for self.name, width, height in (("light", 1280, 900), ("dark", 390, 844)):
            self.page.emulate_media(color_scheme=self.name)
            self.page.set_viewport_size({"width": width, "height": height})
            self.shoot(state)

    def drop(self, target: str, path: Path) -> None:
        """Drop a file, as from the desktop."""
        data = self.page.evaluate_handle(
            """([name, bytes]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], name));
                return data;
            }""",
            [path.name, list(path.read_bytes())],
        )
        self.page.dispatch_event(target, "drop", {"dataTransfer": data})

    def until(self, expression: str) -> None:
        """Wait until an expression is true; the policy of the page forbids that Playwright evaluates it by itself."""
        for _ in range(600):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{expression} stayed false; the page says: {self.page.inner_text('body')}")

    def until_free(self, service: Service) -> None:
        """Wait until no live stream is open."""
        for _ in range(600):
            if not service.open_streams:
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("a live stream stays open")

    def choose(self, kind: str) -> None:
        """Choose where the voice comes from."""
        self.page.check(f"input[name=kind][value={kind}]", force=True)

    def extract(self) -> None:
        """Extract, and wait for the result."""
        self.page.click("#extract")
        self.page.wait_for_selector("#result:not([hidden]) .track.chosen")


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("ONEVOICE_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seconds, so that a slow machine does not reach the end while the sound plays."""
    path = tmp_path_factory.mktemp("mixture") / "mixture.wav"
    write_audio(path, (Voice.number(0).say(1, 12.0) + Voice.number(1).say(0, 12.0)) / 2, RATE)
    return path


def mark(tab: Tab) -> None:
    """Mark a stretch by the pointer, and move its end by the keyboard."""
    page = tab.page
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 40, steps=3)
    page.mouse.up()
    assert [page.input_value(edge) for edge in ("#begin", "#end")] == ["1.2", "4.8"]
    page.focus("#region-end")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#end") == "4.9"


def play_and_switch(tab: Tab) -> None:
    """The voice plays; a switch by the keyboard goes on at the same position."""
    page, position = tab.page, "+document.querySelector('#result-transport .position').value"
    page.click("#result-transport .play")
    tab.until(f"{position} > 0.3")
    page.focus(".track.chosen input")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(".track.chosen input[value=residual]")
    reached = page.evaluate(position)
    assert reached > 0.3
    tab.until(f"{position} > {reached}")
    page.click("#result-transport .play[aria-label=Pause]")


def test_from_a_dropped_file_to_a_download(
    browser: Any, address: str, shots: Path, mixture: Path, service: Service, tmp_path: Path
) -> None:
    tab = Tab(browser, address, shots, viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = tab.page
    tab.shoot("1-start")
    tab.drop("#mixture-drop", mixture)
    page.wait_for_selector("#voice-step:not([hidden])")
    assert page.inner_text("#mixture-facts") == "0:12.0 · 8 kHz · mono"
    assert page.is_disabled("#extract")
    tab.shoot("2-recording")
    mark(tab)
    tab.shoot("3-stretch")
    tab.extract()
    tab.shoot("4-result")
    play_and_switch(tab)
    with page.expect_download() as downloading:
        page.click("#downloads a >> text=WAV >> nth=0")
    assert downloading.value.suggested_filename == "mixture-voice.wav"
    downloading.value.save_as(tmp_path / "voice.wav")
    assert len(read_audio(tmp_path / "voice.wav")[0]) == 12 * RATE
    assert page.locator("#downloads a").count() == 9
    page.click("#forget")
    page.wait_for_selector("#mixture-drop:not([hidden])")
    assert [path for path in service.folder.rglob("*") if path.suffix == ".wav"] == []
    assert tab.words == []
    tab.context.close()


def test_a_voice_is_saved_used_and_deleted(
    browser: Any, address: str, shots: Path, sounds: Path, service: Service
) -> None:
    tab = Tab(browser, address, shots)
    page = tab.page
    page.set_input_files("#mixture-file", sounds / "mixture.wav")
    page.wait_for_selector("#voice-step:not([hidden])")
    tab.choose("enrollment")
    page.set_input_files("#enrollment-file", sounds / "enrollment.wav")
    tab.until("!document.querySelector('#extract').disabled")
    tab.extract()
    assert "biometric" in page.inner_text("#save-state")
    assert not service.settings.voices.exists()
    page.fill("#save-name", "Ann")
    page.click("#save button")
    tab.until("document.querySelector('#save-state').textContent.startsWith('Saved')")
    tab.choose("voice")
    page.check("#voices input")
    tab.shoot("5-saved-voice")
    tab.extract()
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#voices .danger")
    page.wait_for_selector("#voices:empty", state="attached")
    assert [path for path in service.settings.voices.rglob("*") if path.is_file()] == []
    assert tab.words == []
    tab.context.close()


def test_on_a_phone_with_the_microphone(browser: Any, address: str, shots: Path, sounds: Path) -> None:
    phone = {"width": 390, "height": 844}
    tab = Tab(
        browser, address, shots, viewport=phone, color_scheme="dark", permissions=["microphone"], has_touch=True
    )  # fmt: skip
    page = tab.page
    page.set_input_files("#mixture-file", sounds / "mixture.wav")
    page.wait_for_selector("#voice-step:not([hidden])")
    tab.choose("enrollment")
    page.click("#enrollment-record")
    page.wait_for_selector("#enrollment-record.recording")
    tab.until("document.querySelector('#enrollment-record').textContent.includes('0:01')")
    tab.shoot("1-microphone")
    page.click("#enrollment-record")
    tab.until("document.querySelector('#enrollment-name').textContent === 'microphone.wav'")
    tab.extract()
    assert "s of speech in" in page.inner_text("#check-up")
    heard = page.evaluate("fetch(document.querySelector('#downloads a').href).then((answer) => answer.status)")
    assert heard == 200
    tab.shoot("2-result")
    tab.choose("person")
    page.click("#find")
    tab.until("document.querySelector('#find-state').textContent.includes('found')")
    tab.shoot("3-people")

    # what goes wrong is said, and one can go on
    page.click("#mixture-change")
    junk = shots / "junk.wav"
    junk.write_bytes(b"junk")
    page.set_input_files("#mixture-file", junk)
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error").startswith("junk.wav: cannot be decoded")
    tab.shoot("4-error")
    junk.unlink()
    assert [word for word in tab.words if "422" not in word] == []  # the browser logs the answer itself
    tab.context.close()


def voice_of(sounds: Path) -> Any:
    return enroll_files(EXTRACTOR, sounds / "enrollment.wav")


def test_live_sound(browser: Any, address: str, shots: Path, sounds: Path, service: Service) -> None:
    """The microphone comes back, with nobody's voice, with that of a recording, and with a saved one."""
    tab = Tab(browser, address, shots, permissions=["microphone"])
    page = tab.page
    saved = service.voices.save(voice_of(sounds), "Ann", {}, voice_of(sounds))
    page.check("input[name=mode][value=live]", force=True)
    page.wait_for_selector("#live-work:not([hidden])")
    tab.shoot_twice("6-live")
    page.click("#live-toggle")
    tab.until("document.querySelector('#live-state').textContent.includes('everything passes through')")
    tab.until("['in', 'out'].every((name) => document.querySelector(`#live-${name}`).ariaValueNow > -50)")
    tab.until(
        "/^[0-9]+ ms, of which the network needs [0-9]+ ms$/.test(document.querySelector('#live-latency').textContent)"
    )
    assert service.open_streams == 1
    page.check("input[name=live-kind][value=recording]", force=True)
    page.set_input_files("#live-file", sounds / "enrollment.wav")
    tab.until("document.querySelector('#live-state').textContent.includes('the voice comes through')")
    tab.until("document.querySelector('#live-notes').textContent.includes('only 2.0 s of speech')")
    tab.shoot_twice("7-live-recording")
    page.check("input[name=live-kind][value=none]", force=True)
    tab.until("document.querySelector('#live-state').textContent.includes('everything passes through')")
    page.check("input[name=live-kind][value=voice]", force=True)
    page.check(f"input[name=live-voice][value='{saved.id}']")
    tab.until("document.querySelector('#live-state').textContent.includes('the voice comes through')")
    page.fill("#live-strength", "40")
    page.evaluate("document.querySelector('#live-strength').dispatchEvent(new Event('input'))")
    assert page.inner_text("#live-strength + output") == "40 %"
    tab.shoot_twice("8-live-voice")
    assert unnamed(tab) == []
    page.click("#live-toggle")
    assert page.inner_text("#live-state") == "Not running."
    tab.until_free(service)
    assert page.is_hidden("#error")
    service.voices.delete(saved.id)
    assert tab.words == []
    tab.context.close()


SLOW_START = """() => {
    const resume = AudioContext.prototype.resume;
    window.begun = window.started = false;
    AudioContext.prototype.resume = async function () {
        window.begun = true;
        await new Promise((then) => setTimeout(then, 300));
        await resume.call(this).catch(() => {});
        window.started = true;
    };
}"""
"""Sound hardware that is slow to start."""


def test_live_sound_that_is_stopped_while_it_starts(browser: Any, address: str, shots: Path, service: Service) -> None:
    tab = Tab(browser, f"{address}/#live", shots, permissions=["microphone"])
    tab.page.evaluate(SLOW_START)
    connections: list[str] = []
    tab.page.on("websocket", lambda socket: connections.append(socket.url))
    tab.page.click("#live-toggle")
    tab.until("window.begun")
    tab.page.click("#live-toggle")
    tab.until("window.started")
    assert tab.page.inner_text("#live-toggle") == "Start"
    assert (tab.page.inner_text("#error"), connections, tab.words) == ("", [], [])
    tab.context.close()


def test_live_sound_that_ends_says_why(browser: Any, address: str, shots: Path, service: Service) -> None:
    tab = Tab(browser, f"{address}/#live", shots, permissions=["microphone"])
    tab.page.evaluate(SLOW_START)  # the server refuses at once
    with contextlib.ExitStack() as stack:
        for _ in range(service.settings.max_streams):
            stack.enter_context(service.streaming())
        tab.page.click("#live-toggle")
        tab.page.wait_for_selector("#error:not([hidden])")
    assert "all 2 live streams of this server are in use" in tab.page.inner_text("#error")
    assert tab.page.inner_text("#live-toggle") == "Start"
    assert tab.words == []
    tab.context.close()


def test_signing_in(browser: Any, extractor: Extractor, shots: Path, tmp_path: Path) -> None:
    token = "0123456789abcdef"
    with (
        open_service(extractor, Settings(tmp_path / "voices", token, is_local=False)) as service,
        serving(service) as address,
    ):
        tab = Tab(browser, address, shots)
        tab.shoot("0-sign-in")
        tab.page.fill("#token", "wrong")
        tab.page.click("#sign-in button")
        tab.page.wait_for_selector("#error:not([hidden])")
        assert "not the token" in tab.page.inner_text("#error")
        tab.page.fill("#token", token)
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("#work:not([hidden])")
        tab.page.click("#sample")
        tab.page.wait_for_selector("#voice-step:not([hidden])")
        tab.page.click("#mixture-transport .play")
        tab.until("+document.querySelector('#mixture-transport .position').value > 0.1")
        tab.page.reload()
        tab.page.wait_for_selector("#work:not([hidden])")
        tab.page.check("input[name=mode][value=live]", force=True)
        tab.page.wait_for_selector("#live-missing:not([hidden])")
        assert "onevoice serve --live MODEL" in tab.page.inner_text("#live-missing")
        assert tab.page.is_hidden("#live-work")
        tab.shoot("9-no-live")
        assert [word for word in tab.words if "403" not in word] == []
        tab.context.close()


def unnamed(tab: Tab) -> list[str]:
    """Return what can be used and has no name for a screen reader."""
    found: list[str] = tab.page.evaluate(
        """() => [...document.querySelectorAll(
                "a, button, input, select, summary, canvas, audio, [tabindex='0'], [role=meter]")]
            .filter((each) => each.checkVisibility())
            .filter((each) => !(each.ariaLabel || document.getElementById(each.getAttribute("aria-labelledby"))
                || each.labels?.[0]?.textContent.trim() || each.textContent.trim()))
            .map((each) => each.outerHTML)"""
    )
    return found


def test_everything_is_reached_by_keyboard_and_has_a_name(browser: Any, address: str, shots: Path) -> None:
    tab = Tab(browser, address, shots)
    tab.page.click("#sample")
    tab.until("!document.querySelector('#extract').disabled")
    tab.extract()
    assert unnamed(tab) == []
    reached = set()
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        reached.add(tab.page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"mixture-change", "kind", "enrollment-file", "extract", "track", "save-name", "forget"} <= reached
    assert tab.words == []
    tab.context.close()


def test_the_description_of_the_api(browser: Any, address: str, shots: Path) -> None:
    context = browser.new_context()
    page, words = context.new_page(), []
    page.on("console", lambda message: words.append(message.text))
    page.goto(f"{address}/docs")
    page.click("summary >> nth=0")
    assert "enrollment" in page.inner_text("details[open]")
    page.screenshot(path=shots / "light-docs.png", full_page=True)
    assert words == []
    context.close()
