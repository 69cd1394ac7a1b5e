"""Headless Chromium, and the page at /ui in it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def has_chromium() -> bool:
    return all(map(shutil.which, ("chromium", "chromedriver")))


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of the browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1180,900", "--no-proxy-server"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in the browser; waits for what it asks."""

    def __init__(self, browser: Any, base: str) -> None:
        self.browser = browser
        browser.get(f"{base}/ui")

    def until(self, script: str) -> Any:
        """What the script gives, once that is not null, false or empty."""
        return self.wait(lambda: self.browser.execute_script(f"return {script}"))

    def wait(self, what: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 60, 0.05).until(lambda _: what())

    def text(self, id: str) -> str:
        return str(self.browser.find_element("id", id).text)

    def press(self, view: str) -> None:
        """By the keyboard."""
        self.browser.find_element("css selector", f"[data-view={view}]").send_keys("\n")

    def choose(self, file: Path) -> None:
        self.browser.find_element("id", "file").send_keys(str(file))

    def select(self, bundle: str) -> None:
        self.pick("bundle", bundle)

    def pick(self, id: str, option: str) -> None:
        """An option of a list, by its text."""
        self.browser.find_element("xpath", f"//select[@id='{id}']/option[contains(., '{option}')]").click()

    def complaints(self) -> list[str]:
        """What the browser has to say of the page (but for answers that are errors)."""
        log = [entry["message"] for entry in self.browser.get_log("browser")]
        return [message for message in log if "Failed to load resource" not in message]
