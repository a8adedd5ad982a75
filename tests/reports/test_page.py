"""The page in headless Chromium, controlled over a pair of pipes; no driver, no network, no script."""

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
from tests.reports.conftest import HOSTILE, answers, rationale_line, two_classes, write_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-extensions")


class Browser:
    """A DevTools session: sends commands, waits for their answers and keeps the events in between."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._last_id = to, back, b"", 0
        self.events: list[Mapping[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Return the result of a command; events received meanwhile are kept in `events`."""
        self._last_id += 1
        session = {"sessionId": self._session} if getattr(self, "_session", None) else {}
        message = {"id": self._last_id, "method": method, "params": parameters, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> Mapping[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._back, 1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        parsed: Mapping[str, Any] = json.loads(message)
        return parsed

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Load a page in a window of this width with a light or dark colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, x: int, y: int, width: int, height: int) -> bytes:
        """Return a rectangle of the page as PNG, also below the window."""
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])

    def errors(self) -> list[Mapping[str, Any]]:
        """Return what the page logged, threw or requested from a network."""
        self.call("Runtime.evaluate", expression="0")
        methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        requests = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [
            *(event for event in self.events if event.get("method") in methods),
            *(event for event in requests if not event["params"]["request"]["url"].startswith(("file:", "data:"))),
        ]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile; it ends with the context."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    assert PATH is not None
    # Chromium reads commands from descriptor 3 and answers on 4.
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
SIZES = [(width, scheme) for width in (390, 1200) for scheme in ("light", "dark")]


def scanlines(png: bytes) -> bytes:
    """Return the decompressed scanlines of a PNG: a filter type, then the bytes, per line."""
    offset, data = 8, b""
    while offset < len(png):
        (length,) = struct.unpack(">I", png[offset : offset + 4])
        data += png[offset + 8 : offset + 8 + length] if png[offset + 4 : offset + 8] == b"IDAT" else b""
        offset += length + 12
    return zlib.decompress(data)


def colour(shown: Browser, x: int, y: int) -> tuple[int, ...]:
    """Return red, green and blue of one pixel; a single pixel is the same under every filter."""
    return tuple(scanlines(shown.screenshot(x, y, 1, 1))[1:4])


def sweep(root: Path) -> list[Path]:
    """Write runs of seven arms with every optional file and with hostile text."""
    checks = [
        {"check": "free disk", "passed": True, "found": "9 GB", "wanted": "1 GB", "remedy": ""},
        {"check": "memory", "passed": None, "found": None, "wanted": "x" * 200, "remedy": "Take a smaller batch."},
    ]
    overlaps = [{"train_id": "a" * 32, "other_id": "b" * 32, "split": "test", "ngram": "the same eight words " * 9}]
    cost = {"price_per_hour": 2.5, "currency": "EUR", "requests_per_day": 5000, "teacher_price_per_1000": 0.4}
    reasons = (None, "disagrees", "truncated")
    rationales = [
        rationale_line(1000 + k, "positive" if k % 3 else "negative", reasons[k % 3 * (k % 2)]) for k in range(40)
    ]
    rationales += [
        rationale_line(2000, HOSTILE, HOSTILE) | {"question": "w" * 700, "gold_rationale": "Because it is so."}
    ]
    hard, both = ("answer", "teacher_answer"), ("answer", "kl", "rationale")
    arms = [(("answer",), 0.66, 100), (hard, 0.70, 100), (("answer", "kl"), 0.73, 100), (both, 0.77, 100)]
    arms += [(("answer", "kl"), 0.78, 400), (("answer", "kl"), 0.83, 1600), (("answer",), 0.71, 400)]
    folders = []
    for losses, accuracy, labelled in arms:
        for seed in range(3):
            predictions = two_classes(answers(losses, accuracy + 0.01 * seed, seed), 3)
            predictions = [
                line | {"teacher_confidence": 0.5 + 0.49 * (k % 97) / 97} for k, line in enumerate(predictions)
            ]
            predictions[0] |= {"question": HOSTILE, "student_rationale": "r" * 600, "gold_rationale": "Gold says so."}
            folder = write_run(
                root / f"run{len(folders)}",
                losses,
                accuracy + 0.01 * seed,
                seed,
                config={"cost": cost, "task": {"examples": {"num_labelled": labelled}}},
                student={"peak_bytes": 1.2e9, "ms_per_example": 5.0},
                predictions=predictions,
                rationales=rationales if "rationale" in losses else None,
                counts={"train": labelled + 1600, "labelled": labelled, "test": 500, "rationales_kept": 20,
                        "rationales_rejected": {"disagrees": 7, HOSTILE: 1}},
                contamination={"n": 8, "found": overlaps, "num_dropped": 1},
                preflight=checks,
                rows={"train": {"read": 2400, "lost": {"repeated": 12, "too long": 310}, "kept": 2078}},
                command=["train.py", *(f"task.examples.a_rather_long_setting_{k}=a long value" for k in range(9))],
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
def test_the_page_fills_its_width_without_overflow(shown: Browser, page: Path, width: int, scheme: str) -> None:
    shown.open(page, width, scheme)
    assert shown.value("document.documentElement.scrollWidth") <= shown.value("document.documentElement.clientWidth")
    top = shown.screenshot(0, 0, width, 900)
    assert struct.unpack(">II", top[16:24]) == (width, 900)
    assert len(set(scanlines(top))) > 100  # an image of one colour has a handful
    inner, height = shown.value("document.documentElement.clientWidth"), shown.value("document.body.scrollHeight")
    left, right = (shown.screenshot(x, 0, 10, min(height, 15000)) for x in (2, inner - 12))
    assert left == right
    assert len(set(scanlines(right))) < 10
    assert shown.errors() == []


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_conclusion_is_in_the_first_screen(shown: Browser, page: Path, width: int, scheme: str) -> None:
    shown.open(page, width, scheme)
    box = "document.querySelector('.lead').getBoundingClientRect()"
    assert 0 <= shown.value(f"{box}.left") < shown.value(f"{box}.right") <= width
    assert 0 < shown.value(f"{box}.top") < shown.value(f"{box}.bottom") < 844  # a phone's height


def test_tables_need_no_scrolling_on_a_phone(shown: Browser, page: Path) -> None:
    shown.open(page, 390)
    wide = "[...document.querySelectorAll('table.stack')].filter(e => e.scrollWidth > e.parentElement.clientWidth)"
    assert shown.value("document.querySelectorAll('table.stack').length") > 5
    assert shown.value(f"{wide}.length") == 0
    cell = "getComputedStyle(document.querySelector('table.stack td'), '::before').content"
    assert shown.value(cell) == '"points"'


def test_the_page_follows_the_colour_scheme_and_prints_to_pdf(shown: Browser, page: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        shown.open(page, 1280, scheme)
        colours[scheme] = colour(shown, 3, 3)
    assert min(colours["light"]) > 240
    assert max(colours["dark"]) < 40
    pdf = base64.b64decode(shown.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    assert shown.errors() == []


def test_every_section_is_visible(shown: Browser, page: Path) -> None:
    shown.open(page, 1280)
    titles = shown.value("[...document.querySelectorAll('h2')].filter(e => e.offsetHeight > 0).map(e => e.textContent)")
    assert titles == [
        "Distillation helped.", "Verdicts", "Differences", "One setting changed", "Steps to equal", "Results",
        "Comparison", "Answers by class", "Accuracy by share answered", "Effect of each setting", "Cost and break-even",
        "Learning curves", "Reliability", "Accuracy by the teacher's confidence",
        "Accuracy against size, latency and cost",
        "Accuracy against data and size", "Each seed", "Sample predictions", "Rationales", "Cache and data",
        "Provenance", "How to read this",
    ]  # fmt: skip
    assert "power law" not in shown.value("document.body.textContent").split("answer + kl, labelled examples")[1][:80]


def test_rationales_can_be_filtered_by_keyboard_alone(shown: Browser, page: Path) -> None:
    shown.open(page, 390)
    visible = "[...document.querySelectorAll('.browse .sample')].filter(e => e.offsetHeight > 0)"
    total = shown.value("document.querySelectorAll('.browse .sample').length")
    assert shown.value(f"{visible}.length") == total > 0
    shown.value("document.querySelector('.filters input').focus()")
    counts = []
    for place in range(shown.value("document.querySelectorAll('.filters input').length") - 1):
        shown.press("ArrowDown", 40)
        assert shown.value("document.activeElement.id") == f"f{place}"
        counts.append(shown.value(f"{visible}.length"))
        assert counts[-1] == shown.value(f"document.querySelectorAll('.browse .m{place}').length")
    assert all(0 < count < total for count in counts)


def test_errors_of_a_page_are_caught(shown: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", "<script>alert(1)</script></body>"))
    shown.open(broken, 1280)
    assert any("Content Security Policy" in str(event) for event in shown.errors())
