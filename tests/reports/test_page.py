"""The page in a real browser: headless Chromium, spoken to over a pair of pipes; no driver, no network, no script."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.reports.page import write_report
from tests.reports.conftest import HOSTILE, answers, lesson, write_run

PATH = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-extensions")


class Browser:
    """The DevTools protocol: commands with an answer each, and events in between."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._last = to, back, b"", 0
        self.events: list[Mapping[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command; what is told meanwhile is kept in `events`."""
        self._last += 1
        session = {"sessionId": self._session} if getattr(self, "_session", None) else {}
        message = {"id": self._last, "method": method, "params": parameters, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> Mapping[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._back, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: Mapping[str, Any] = json.loads(message)
        return found

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Show a page in a window of that width, in light or dark colours, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, x: int, y: int, width: int, height: int) -> bytes:
        """A part of the page as PNG, also of what is below the window."""
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(picture["data"])

    def complaints(self) -> list[Mapping[str, Any]]:
        """What the page logged, threw, or asked of a network."""
        self.call("Runtime.evaluate", expression="0")
        told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        asked = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [
            *(event for event in self.events if event.get("method") in told),
            *(event for event in asked if not event["params"]["request"]["url"].startswith(("file:", "data:"))),
        ]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended afterwards."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    assert PATH is not None
    # The browser reads commands at descriptor 3 and answers at 4.
    command = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", PATH, *FLAGS]
    command += [f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        shown = Browser(ours_out, ours_in)
        yield shown
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(ours_out)
        os.close(ours_in)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PATH is None, reason="needs a browser: apt-get install chromium fonts-dejavu-core"),
]
SIZES = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


def scanlines(png: bytes) -> bytes:
    """The lines of a PNG as they are packed: the kind of filter, then the bytes."""
    place, data = 8, b""
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        data += png[place + 8 : place + 8 + length] if png[place + 4 : place + 8] == b"IDAT" else b""
        place += length + 12
    return zlib.decompress(data)


def colour(shown: Browser, x: int, y: int) -> tuple[int, ...]:
    """Red, green and blue of one pixel, which no filter changes."""
    return tuple(scanlines(shown.picture(x, y, 1, 1))[1:4])


def sweep(root: Path) -> list[Path]:
    """Seven arms, with everything that a run folder can hold and text that wants to break the page."""
    checks = [
        {"check": "free disk", "passed": True, "found": "9 GB", "wanted": "1 GB", "remedy": ""},
        {"check": "memory", "passed": None, "found": None, "wanted": "x" * 200, "remedy": "Take a smaller batch."},
    ]
    found = [{"train_id": "a" * 32, "other_id": "b" * 32, "split": "test", "ngram": "the same eight words " * 9}]
    cost = {"price_per_hour": 2.5, "currency": "EUR", "requests_per_day": 5000, "teacher_price_per_1000": 0.4}
    lessons = [lesson(1000 + k, "positive" if k % 3 else "negative", (None, "disagrees", "truncated")[k % 3 * (k % 2)])
               for k in range(40)]  # fmt: skip
    lessons += [lesson(2000, HOSTILE, HOSTILE) | {"question": "w" * 700, "gold_rationale": "Because it is so."}]
    hard, both = ("answer", "teacher_answer"), ("answer", "kl", "rationale")
    arms = [(("answer",), 0.66, 100), (hard, 0.70, 100), (("answer", "kl"), 0.73, 100), (both, 0.77, 100)]
    arms += [(("answer", "kl"), 0.78, 400), (("answer", "kl"), 0.83, 1600), (("answer",), 0.71, 400)]
    folders = []
    for losses, accuracy, labelled in arms:
        for seed in range(3):
            told = answers(losses, accuracy + 0.01 * seed, seed)
            told = [line | {"teacher_confidence": 0.5 + 0.49 * (k % 97) / 97} for k, line in enumerate(told)]
            told[0] |= {"question": HOSTILE, "student_rationale": "r" * 600, "gold_rationale": "Gold says so."}
            folder = write_run(
                root / f"run{len(folders)}",
                losses,
                accuracy + 0.01 * seed,
                seed,
                config={"cost": cost, "task": {"examples": {"num_labelled": labelled}}},
                student={"peak_bytes": 1.2e9, "ms_per_example": 5.0},
                predictions=told,
                rationales=lessons if "rationale" in losses else None,
                counts={"train": labelled + 1600, "labelled": labelled, "test": 500, "rationales_kept": 20,
                        "rationales_rejected": {"disagrees": 7, HOSTILE: 1}},
                contamination={"n": 8, "found": found, "num_dropped": 1},
                preflight=checks,
            )  # fmt: skip
            folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_report(sweep(root), root / "out")
    return root / "out" / "report.html"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_page_fills_its_width_and_nothing_sticks_out(shown: Browser, page: Path, width: int, scheme: str) -> None:
    shown.open(page, width, scheme)
    assert shown.ask("document.documentElement.scrollWidth") <= shown.ask("document.documentElement.clientWidth")
    top = shown.picture(0, 0, width, 900)
    assert struct.unpack(">II", top[16:24]) == (width, 900)
    assert len(set(scanlines(top))) > 100  # a picture of one colour has a handful
    inner, height = shown.ask("document.documentElement.clientWidth"), shown.ask("document.body.scrollHeight")
    left, right = (shown.picture(x, 0, 10, min(height, 15000)) for x in (2, inner - 12))
    assert left == right
    assert len(set(scanlines(right))) < 10
    assert shown.complaints() == []


def test_page_is_light_or_dark_as_the_reader_likes_and_light_on_paper(shown: Browser, page: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        shown.open(page, 1280, scheme)
        colours[scheme] = colour(shown, 3, 3)
    assert min(colours["light"]) > 240
    assert max(colours["dark"]) < 40
    pdf = base64.b64decode(shown.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    assert shown.complaints() == []


def test_every_section_can_be_seen(shown: Browser, page: Path) -> None:
    shown.open(page, 1280)
    titles = shown.ask("[...document.querySelectorAll('h2')].filter(e => e.offsetHeight > 0).map(e => e.textContent)")
    assert titles == [
        "Differences", "One choice apart", "Results", "Comparison", "What mattered", "Cost and break-even",
        "Learning curves", "Reliability", "Accuracy by the teacher's confidence",
        "Accuracy against size, latency and cost",
        "Accuracy against data and size", "Each seed", "Sample predictions", "Rationales", "Cache and data",
        "Provenance", "How to read this",
    ]  # fmt: skip
    assert "power law" not in shown.ask("document.body.textContent").split("answer + kl, labelled examples")[1][:80]


def test_rationales_are_filtered_by_keyboard_alone(shown: Browser, page: Path) -> None:
    shown.open(page, 390)
    visible = "[...document.querySelectorAll('.browse .sample')].filter(e => e.offsetHeight > 0)"
    total = shown.ask("document.querySelectorAll('.browse .sample').length")
    assert shown.ask(f"{visible}.length") == total > 0
    shown.ask("document.querySelector('.filters input').focus()")
    counts = []
    for place in range(shown.ask("document.querySelectorAll('.filters input').length") - 1):
        shown.press("ArrowDown", 40)
        assert shown.ask("document.activeElement.id") == f"f{place}"
        counts.append(shown.ask(f"{visible}.length"))
        assert counts[-1] == shown.ask(f"document.querySelectorAll('.browse .m{place}').length")
    assert all(0 < count < total for count in counts)


def test_what_a_page_says_against_itself_is_heard(shown: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", "<script>alert(1)</script></body>"))
    shown.open(broken, 1280)
    assert any("Content Security Policy" in str(event) for event in shown.complaints())
