"""Take the documentation's pictures of the page at /ui, from the demo store in headless Chromium.

python docs/pictures.py        # ui.png, overview.png, inside.png, page.gif beside this file
"""

import base64
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from handlers.demo import STORE, AsgiServer
from handlers.demo_images import NOBODY, samples
from handlers.process import ROOT

HERE = Path(__file__).parent
WIDTH, HEIGHT = 1180, 900  # pixels of the pictures
GIF, COLORS = (780, 620), 128
SHIP = ROOT / "tests" / "data" / "photos" / "ship-0001.png"
TRAFFIC = [each for each in samples() if each.shown and not each.bundle and each.customer != NOBODY]


class Page:
    """The page in a browser of a certain size."""

    def __init__(self, driver: Any, base: str, width: int, height: int) -> None:
        self.driver = driver
        self.size(width, height)
        driver.get(f"{base}/ui")
        self.until("before && document.querySelectorAll('#bundle option').length")
        self.until("[...document.querySelectorAll('#examples img')].length > 12")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def until(self, script: str) -> None:
        WebDriverWait(self.driver, 60, 0.05).until(lambda driver: driver.execute_script(f"return {script}"))

    def run(self, script: str) -> None:
        self.driver.execute_script(script)

    def view(self, name: str) -> None:
        self.run(f"view('{name}')")

    def choose(self, file: Path) -> None:
        self.run("delete document.body.dataset.shown")
        self.driver.find_element("id", "file").send_keys(str(file))
        self.until("document.body.dataset.shown")

    def picture(self) -> Image.Image:
        time.sleep(0.3)  # pictures are decoded
        raw = base64.b64decode(self.driver.get_screenshot_as_base64())
        return Image.open(io.BytesIO(raw)).convert("RGB")

    def whole(self, width: int, most: int) -> Image.Image:
        """The page from its top, at most ``most`` pixels of it."""
        self.size(width, HEIGHT)
        self.size(width, min(most, int(self.driver.execute_script("return document.documentElement.scrollHeight"))))
        return self.picture()


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


def stills(page: Page, send: Callable[[], None]) -> None:
    """One picture of each view that has something to show."""
    page.run("second.value = JSON.stringify(['paper', '1'])")
    page.choose(SHIP)
    page.whole(WIDTH, 1500).save(HERE / "ui.png", optimize=True)
    page.view("overview")
    page.until("[...document.querySelectorAll('#cards img')].length >= 30")
    send()
    page.run("look()")
    page.until("[...document.querySelectorAll('.live')].some(live => live.textContent.includes('a second'))")
    page.whole(WIDTH, 1200).save(HERE / "overview.png", optimize=True)
    inside(page, "paper")
    page.run("document.querySelector('#layers details').open = true; $('color').value = 'clusters'; paint()")
    page.whole(WIDTH, 1600).save(HERE / "inside.png", optimize=True)


def inside(page: Page, bundle: str) -> None:
    """Look inside a bundle."""
    page.run(f"delete inside.dataset.shown; wanted = JSON.stringify(['{bundle}', '1'])")
    page.view("inside")
    page.until("inside.dataset.shown")


def film(page: Page, send: Callable[[], None], folder: Path) -> None:
    """The page in use: frames and how long each is shown, in ms. ``folder``: for images to choose."""
    frames: list[tuple[Image.Image, int]] = []
    page.size(*GIF)
    page.run("second.value = ''")

    def shot(ms: int, top: str = "") -> None:
        page.run(f"scrollTo(0, {top} - 12)" if top else "scrollTo(0, 0)")
        frames.append((page.picture(), ms))

    def at(id: str) -> str:
        return f"document.getElementById('{id}').getBoundingClientRect().top + scrollY"

    page.view("overview")
    send()
    page.run("look()")
    page.until("[...document.querySelectorAll('.live')].some(live => live.textContent.includes('a second'))")
    shot(2200)
    page.view("try")
    for customer in ("digits", "groceries"):
        content = next(each.content for each in TRAFFIC if each.customer == customer)
        (folder / f"{customer}.png").write_bytes(content)
    for file in (SHIP, folder / "digits.png", folder / "groceries.png"):
        page.choose(file)
        shot(1600, at("ask"))
    page.run("second.value = JSON.stringify(['paper', '1'])")
    page.choose(SHIP)
    shot(2000, at("ask"))
    inside(page, "paper")
    shot(1800)
    page.run("against.selectedIndex = 2; delete layers.dataset.shown; against.onchange()")
    page.until("layers.dataset.shown")
    shot(1800)
    page.run("$('color').value = 'clusters'; paint()")
    shot(1500, at("plane"))
    shot(1800, at("groups"))
    first, *rest = (frame.quantize(COLORS, dither=Image.Dither.NONE) for frame, _ in frames)
    durations = [ms for _, ms in frames]
    first.save(HERE / "page.gif", save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def main() -> None:
    """Start a server, take all pictures, and stop it."""
    with AsgiServer(STORE) as server, browser() as driver, tempfile.TemporaryDirectory() as temporary:
        url = server.url

        def send() -> None:
            for each in TRAFFIC:
                httpx.post(url, content=each.content, trust_env=False, timeout=60).raise_for_status()

        send()
        page = Page(driver, url.removesuffix("/v1/predict"), WIDTH, HEIGHT)
        stills(page, send)
        film(page, send, Path(temporary))
    for name in ("ui.png", "overview.png", "inside.png", "page.gif"):
        print(f"{HERE / name}: {(HERE / name).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
