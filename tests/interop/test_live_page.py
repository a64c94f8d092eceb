# SPDX-License-Identifier: Apache-2.0
"""The live page in a real Chromium: what it shows, that it works by keyboard alone, and that it loads nothing from other servers."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from nbdtarget.control.figures import (
    DeviceFigures,
    Figures,
    FiguresAnswer,
    History,
    HistoryAnswer,
)
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None, reason="chromium is not installed (Debian: chromium)"
    ),
]
MIB = 1 << 20
SIZE = 8 * MIB
TIMEOUT_MS = (
    PATIENCE_S * 1000
)  # the page asks once a second, on a machine that may be busy
RATE = 16384  # bytes a second: the cache of 4 MiB is not written back before a slow machine has stopped that


class Site:
    """A server with a clone that does not copy by itself, and the address of its page."""

    def __init__(self, folder: Path) -> None:
        self.nbd, self.control = folder / "nbd.sock", folder / "control.sock"
        argv = [NBDTARGET, "serve", "--listen", f"unix:{self.nbd}"]
        self.server = ServerProcess(
            [*argv, "--control", str(self.control)],
            sockets=[self.nbd],
            log=folder / "log",
        )
        self.client = ControlClient(self.control)
        (folder / "source.img").write_bytes(os.urandom(SIZE))
        (folder / "dest.img").write_bytes(bytes(SIZE))
        names = f"{folder}/meta.img {folder}/dest.img {folder}/source.img"
        table = f"0 {SIZE // 512} clone {names} 128 1 no_hydration"
        self.create("web", table)
        self.create("top <b>", f"0 {SIZE // 512} linear /dev/mapper/web 0")
        (folder / "origin.img").write_bytes(bytes(SIZE))
        (folder / "fast.img").write_bytes(bytes(SIZE))
        names = f"{folder}/fast.meta {folder}/fast.img {folder}/origin.img"
        # The copy is so slow that a person could watch it.
        features = f"1 writeback smq 2 migration_rate {RATE}"
        self.create("slow", f"0 {SIZE // 512} cache {names} 128 {features}")
        self.pages: list[subprocess.Popen[str]] = []
        self.url = self.open_page()

    def open_page(self, *options: str) -> str:
        """Start `nbdtarget page`. Returns the address that it prints."""
        page = subprocess.Popen(
            [NBDTARGET, "page", "--control", str(self.control), *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pages.append(page)
        assert page.stdout is not None
        return page.stdout.readline().strip()

    def create(self, name: str, table: str) -> None:
        self.client.ask("create", m.Create(name, table), m.Done)

    def device(self, name: str) -> DeviceFigures:
        figures = self.client.ask("figures", Figures((name,)), FiguresAnswer)
        return figures.devices[0]

    def field(self, name: str, field: str) -> int:
        value = self.device(name).targets[0].fields[field]
        assert isinstance(value, int)
        return value

    def type_of(self, name: str) -> str:
        return self.device(name).targets[0].type

    def is_uncaching(self, name: str) -> bool:
        return self.device(name).uncaching

    def is_suspended(self) -> bool:
        info = self.client.ask("info", m.Info(("web",)), m.InfoAnswer)
        return info.devices[0].state == "SUSPENDED"

    def close(self) -> None:
        for page in self.pages:
            page.terminate()
            page.communicate(timeout=PATIENCE_S)
        assert self.server.terminate() == 0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT_MS
        )
        yield browser
        browser.close()


def new_page(browser: Any, **options: Any) -> Any:
    """A page in a context of its own, whose every step may take long: Playwright's own bound is 30 s."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    return page


def test_the_page_shows_a_server_and_changes_it_by_keyboard(
    site: Site, browser: Any
) -> None:
    expect = sync_api.expect
    expect.set_options(timeout=TIMEOUT_MS)
    page = new_page(browser, viewport={"width": 1280, "height": 1200})
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    with PlainClient(site.nbd, "web") as client:
        client.write(0, bytes(2 * MIB))
        page.goto(site.url)
        # The upper device, and below it the one that it stands on. A name is text and no markup.
        names = page.locator("#devices button.name")
        expect(names).to_have_text(["top <b>", "web", "slow"])
        expect(page.locator("#devices b")).to_have_count(0)
        assert "token" not in page.url
        expect(page.locator("#clients tbody tr")).to_contain_text(["web"])
        expect(page.locator("#events li").first).to_be_visible()

        # By keyboard: to the device, to its buttons.
        names.nth(1).focus()
        page.keyboard.press("Enter")
        expect(page.locator("#device-title")).to_have_text("Device web")
        words = page.locator("#map-words")
        expect(words).to_contain_text("25 % copied")
        expect(words).to_contain_text("75 % still read from the source")
        label = re.compile("25 % copied")
        expect(page.locator("#map")).to_have_attribute("aria-label", label)
        # The first pixel is copied, the last one is not.
        page.wait_for_function(
            """() => { const c = document.getElementById("map");
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            return `${d.slice(0, 3)} ${d.slice(-4, -1)}` === "26,127,55 208,215,222"; }"""
        )
        expect(page.locator("#rate canvas")).to_be_visible()

        page.locator("#suspend").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#resume")).to_be_enabled()
        expect(page.locator("#answer")).to_have_text("Done.")
        assert site.is_suspended()
        page.locator("#resume").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#suspend")).to_be_enabled()
        assert not site.is_suspended()
        expect(page.locator("#events li").last).to_contain_text("web: resumed")

        page.get_by_label("Message to the target").fill("nonsense 1")
        page.keyboard.press("Enter")
        expect(page.locator("#answer")).to_contain_text("nonsense")
        page.get_by_label("Message to the target").fill("hydration_threshold 4")
        page.keyboard.press("Enter")
        expect(page.locator("#answer")).to_have_text("Done.")
    expect(page.locator("#no-clients")).to_be_visible()
    origin = site.url.partition("/#")[0]
    assert {url.startswith((origin, "data:")) for url in requests} == {True}
    removes_a_cache(site, page)
    shows_what_was_before_it(site, browser)
    asks_for_the_token(site, browser)
    has_no_buttons_when_it_may_only_look(site, browser)
    # A refused message is an answer of 422, and so is one of 409 when the page asks for the map of a device that is suspended
    # at that moment. Chromium mentions both; nothing else was said.
    expected = re.compile(r"the server responded with a status of (409|422) ")
    assert [said for said in complaints if not expected.search(said)] == []


def asks_for_the_token(site: Site, browser: Any) -> None:
    """Open the page without the token, in a tab that does not know it."""
    address, _, token = site.url.partition("#token=")
    page = new_page(browser)
    page.goto(address)
    field = page.get_by_label("Token of the control socket")
    sync_api.expect(field).to_be_focused()
    sync_api.expect(page.locator("#main")).to_be_hidden()
    field.fill(token)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#devices button.name")).to_have_count(3)


def has_no_buttons_when_it_may_only_look(site: Site, browser: Any) -> None:
    page = new_page(browser)
    page.goto(site.open_page("--read-only"))
    expect = sync_api.expect
    expect(page.locator("#devices button.name")).to_have_count(3)
    expect(page.locator("#map-title")).to_be_attached()
    expect(page.locator("#verbs")).to_be_hidden()
    expect(page.locator("#server")).to_contain_text("read-only")
    # A request like those of the buttons is refused, too.
    refused = page.evaluate(
        """async () => { const { ask } = await import("./page/server.js");
        return ask("suspend", { name: "web" }).then(() => "", (error) => error.message); }"""
    )
    assert refused == "suspend: this token may look, and not change"
    assert not site.is_suspended()


def removes_a_cache(site: Site, page: Any) -> None:
    """Begin, watch, stop; and once more, to the end."""
    expect = sync_api.expect
    with PlainClient(site.nbd, "slow") as client:
        words = m.Message("slow", 0, ("migration_rate", "0"))
        site.client.ask("message", words, m.MessageAnswer)
        site.client.ask(
            "message", m.Message("slow", 0, ("warm", "0-64")), m.MessageAnswer
        )
        wait_until(lambda: site.field("slow", "cache_blocks_used") >= 64)
        words = m.Message("slow", 0, ("migration_rate", str(RATE)))
        site.client.ask("message", words, m.MessageAnswer)
        for block in range(64):
            client.write(block * 65536, b"x" * 4096)
        page.get_by_role("button", name="slow", exact=True).click()
        expect(page.locator("#device-title")).to_have_text("Device slow")
        expect(page.locator("#uncaching")).to_be_hidden()
        page.once("dialog", lambda dialog: dialog.dismiss())
        page.locator("#uncache").click()
        assert site.type_of("slow") == "cache"
        assert not site.is_uncaching("slow")
        page.on("dialog", lambda dialog: dialog.accept())
        page.locator("#uncache").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#uncaching")).to_be_visible()
        expect(page.locator("#uncaching-words")).to_contain_text(
            "must still be written back"
        )
        expect(page.locator("#uncache")).to_be_hidden()
        page.locator("#stop-uncaching").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#answer")).to_contain_text("stopped; ")
        expect(page.locator("#uncaching")).to_be_hidden()
        assert site.type_of("slow") == "cache"
        site.client.ask(
            "message", m.Message("slow", 0, ("migration_rate", "0")), m.MessageAnswer
        )
        page.locator("#uncache").click()
        expect(page.locator("#answer")).to_contain_text("alone is the disk")
        expect(page.locator("#uncache")).to_be_hidden()
        assert site.type_of("slow") == "linear"
        assert client.read(63 * 65536, 4096) == b"x" * 4096


def shows_what_was_before_it(site: Site, browser: Any) -> None:
    """A page that has just been opened shows the minutes before."""
    page = new_page(browser)

    def nr_moments() -> int:
        return len(site.client.ask("history", History("web"), HistoryAnswer).moments)

    wait_until(lambda: nr_moments() >= 3)
    opened_s = time.time()
    page.goto(site.open_page())
    sync_api.expect(page.locator("#devices button.name")).to_have_count(3)
    page.locator("#devices button.name").nth(1).click()
    page.wait_for_function(
        """async (opened) => { const { moments } = await import("./page/charts.js");
        return moments("web").some((time) => time < opened); }""",
        arg=opened_s,
    )
