"""The page at /ui in a real browser."""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade import Engine, Prediction
from cascade.bundle.format import read, write
from cascade.offline import report
from cascade.offline.job import files_of
from cascade.offline.predict import predict_files
from handlers.asgi import ui
from tests.conftest import need
from tests.helpers.asgi_server import Asgi, serving_asgi
from tests.helpers.browser import Page, chromium, has_chromium
from tests.helpers.deferral import two_sizes
from tests.helpers.keys import digest
from tests.helpers.paths import DATA
from tests.helpers.servers import CLIENT

pytestmark = pytest.mark.e2e
TAB, ARROW_RIGHT = "\ue004", "\ue014"  # as WebDriver writes the keys
PHOTO = DATA / "photos" / "cat-0000.png"

# A file that is dragged in cannot be made from outside of the page.
DROP = """
const done = arguments[arguments.length - 1];
const input = document.getElementById("file"), drop = document.getElementById("drop");
const files = new DataTransfer();
files.items.add(new File([Uint8Array.from(arguments[0])], "cat.png", {type: "image/png"}));
drop.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
done();
"""


PASTE = """
const files = new DataTransfer();
files.items.add(new File([Uint8Array.from(arguments[0])], "cat.png", {type: "image/png"}));
document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: files}));
arguments[arguments.length - 1]();
"""


# Once all are decoded: name, what stands below, width in px of the picture itself.
PICTURES = """(figures => figures.every(f => f.firstChild.complete && f.firstChild.naturalWidth) && figures.map(
    f => [f.title, ...[...f.querySelectorAll("span")].map(s => s.textContent), f.firstChild.naturalWidth])
)([...document.querySelectorAll("#neighbors figure")])"""


# Of a card and of its text, 0 to 1.
LIGHTNESS = """(style => [style.backgroundColor, style.color].map(
    color => color.match(/[\\d.]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0) / 765)
)(getComputedStyle(document.querySelector("#cards section")))"""


# The fact about an answer like the last one, but by the second likeliest bundle.
ANSWERED_BY = """const [first, second] = answer.dispatch.likely;
return [first.name, Object.fromEntries(about({...answer, bundle: second.name}))["answered by"]];"""


# What a person can act on or is told, as far as it is visible; pictures without a text stand beside their name.
CONTROLS = """[...document.querySelectorAll(
    "a[href], button, input, select, summary, meter, canvas, [tabindex], img:not([alt=''])")]
    .filter(element => element.checkVisibility())"""
# Those of them that the Tab key has not reached, as HTML.
UNREACHED = f"""{CONTROLS}.filter(e => e.tabIndex >= 0 && !e.disabled && !e.dataset.reached)
    .map(e => e.outerHTML.slice(0, 80))"""


def percent(share: float) -> str:
    """As the page writes it."""
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    need(has_chromium(), "no Chromium here: apt-get install chromium chromium-driver")
    with chromium() as driver:
        yield driver


@contextmanager
def screen(browser: Any, scheme: str, width: int) -> Iterator[None]:
    """A light or a dark screen of a certain width in px."""
    browser.set_window_size(width, 900)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.set_window_size(1180, 900)


def test_an_image_is_shown_with_its_answer(
    browser: Any, asgi: Asgi, engine: Engine, photos: list[bytes], tmp_path: Path
) -> None:
    (want,) = engine.predict([PHOTO])
    assert isinstance(want, Prediction)
    page = Page(browser, asgi.base)
    assert page.until("document.querySelectorAll('#bundle option').length") == 3
    page.choose(PHOTO)
    assert page.until("document.body.dataset.shown") in ("one", "two"), "the one that fits: they are alike"
    assert "one" in page.text("likely") and "two" in page.text("likely")
    likeliest, answered_by = page.browser.execute_script(ANSWERED_BY)
    assert answered_by.endswith(f", because its label is likelier than that of {likeliest}")
    assert "because" not in page.text("facts"), "here the likeliest has answered"
    page.browser.execute_script("delete document.body.dataset.shown; bundle.selectedIndex = 1; bundle.onchange()")
    assert page.until("document.body.dataset.shown") == "one"
    facts = page.text("facts")
    for text in (f"cluster\n{want.cluster}", "confidence", "out of domain", " + ".join(want.masks), " ms"):
        assert text in facts
    assert want.labels[0].name in page.text("labels") and f"{want.labels[0].score:.2f}" in page.text("labels")
    shown = page.until(PICTURES)
    assert shown == [[n.name, n.label, f"{n.similarity:.2f}", 32] for n in want.neighbors], "pictures of 32 px"
    drawn = "new Set(document.getElementById('map').getContext('2d').getImageData(0, 0, 1400, 700).data).size"
    assert page.until(drawn) > 50, "colors on the map"
    assert "this image" in page.text("legend")

    page.browser.execute_script("bundle.selectedIndex = 2; bundle.onchange()")
    assert page.until("document.body.dataset.shown") == "two"
    bars = page.text("neighbors")
    assert all(f"{n.label}: {n.name}" in bars and f"{n.similarity:.2f}" in bars for n in want.neighbors)
    assert page.browser.execute_script("return document.querySelectorAll('#neighbors figure').length") == 0
    page.browser.execute_script("bundle.selectedIndex = 1; bundle.onchange()")

    page.browser.execute_async_script(DROP, list(photos[0]))
    assert page.until("document.body.dataset.shown") == "one"
    (dropped,) = engine.predict(photos[:1])
    assert isinstance(dropped, Prediction) and dropped.labels[0].name in page.text("labels")
    assert f"{dropped.labels[0].score:.2f}" in page.text("labels")
    page.browser.execute_script("document.getElementById('mode').value = 'unconditional'; mode.onchange()")
    assert page.until("document.getElementById('facts').textContent.includes('unconditional')")

    (tmp_path / "no.png").write_bytes(b"no image")
    page.choose(tmp_path / "no.png")
    assert "this is not a JPEG" in page.until("document.getElementById('error').textContent")
    assert not any(page.text(id) for id in ("facts", "labels", "neighbors", "legend")), "the last answer is another's"
    assert page.complaints() == []


def test_an_image_unlike_the_training_images_is_said_to_be(
    browser: Any, asgi: Asgi, engine: Engine, tmp_path: Path
) -> None:
    """Its labels are muted: they would be one of the bundle's, whatever it shows."""
    page = Page(browser, asgi.base)
    assert page.until("document.querySelectorAll('#bundle option').length") == 3
    page.browser.execute_script("bundle.selectedIndex = 1")
    for name, size, unknown in (("noise", 32, True), ("known", 0, False)):
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        file = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(file) if size else file.write_bytes(PHOTO.read_bytes())
        (answer,) = engine.predict([file])
        assert isinstance(answer, Prediction) and (answer.ood >= 0.99) == unknown
        page.choose(file)
        assert page.until("document.body.dataset.shown") == "one"
        assert ("labels mean little" in page.text("facts")) == unknown
        assert page.browser.execute_script("return labels.className") == ("muted" if unknown else "")


def test_nothing_is_said_of_what_a_bundle_has_not(browser: Any, asgi: Asgi) -> None:
    """One mask has no clusters; its out-of-domain score is 0 where it was not fitted."""
    page = Page(browser, asgi.base)
    page.until("document.querySelectorAll('#bundle option').length && before")
    page.browser.execute_script("before.bundles.forEach(b => Object.assign(b, {masks: 1, out_of_domain: false}))")
    page.choose(PHOTO)
    assert page.until("document.body.dataset.shown")
    assert "no score for it" in page.text("facts") and "cluster" not in page.text("facts")


def test_overview_of_all_bundles(browser: Any, asgi: Asgi, bundle_path: Path) -> None:
    """A card for each, with what it knows and does now; a button that takes one to try it."""
    card = read(bundle_path).card
    page = Page(browser, asgi.base)
    page.press("overview")
    assert page.until("document.querySelectorAll('#cards section').length") == 2
    assert page.until(
        "[...document.querySelectorAll('#cards section')].every(s => s.querySelector('.live').textContent)"
    )
    one, two = (found.text for found in browser.find_elements("css selector", "#cards section"))
    assert one.startswith("one 1\n") and two.startswith("two 1\n")
    assert card.classes[0] in one and " % of held-out images right" in one and f"{len(card.masks)} masks" in one
    assert page.until("document.querySelectorAll('#cards img').length") == 6, "of the one that has thumbnails"
    assert "2 bundles over tf_efficientnet_lite0: backbone " in page.text("server")
    before = CLIENT.get(f"{asgi.base}/v1/overview").json()["bundles"][0]["images"]
    CLIENT.post(f"{asgi.base}/v1/predict", content=PHOTO.read_bytes(), headers={"X-Cascade-Bundle": "one"})
    assert page.until(f"document.querySelector('.live').textContent.startsWith('{before + 1:,} images')")
    assert " a second, " in page.until("document.querySelector('.live').textContent")
    browser.find_element("css selector", "[aria-label='Try two 1']").send_keys("\n")
    assert page.until("document.getElementById('overview').hidden && bundle.value") == '["two","1"]'
    assert page.complaints() == []


def test_the_program_beside_the_answer_gives_the_same(browser: Any, asgi: Asgi, tmp_path: Path) -> None:
    """Curl and the client, as the page writes them; the image is pasted."""
    page = Page(browser, asgi.base)
    page.until("document.querySelectorAll('#bundle option').length")
    page.browser.execute_script("bundle.selectedIndex = 1; mode.value = 'unconditional'")
    page.browser.execute_async_script(PASTE, list(PHOTO.read_bytes()))
    assert page.until("document.body.dataset.shown") == "one"
    label = page.text("labels").splitlines()[0]
    browser.find_element("css selector", "#code summary").send_keys("\n")
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": asgi.base}
    browser.execute_cdp_cmd("Browser.grantPermissions", allowed)
    for name in ("curl", "python"):
        browser.find_element("css selector", f"[data-copy={name}]").send_keys("\n")
        page.until(f"document.querySelector('[data-copy={name}]').textContent === 'Copied'")
        read_back = "navigator.clipboard.readText().then(arguments[0])"
        assert browser.execute_async_script(read_back) == page.text(name)
    shutil.copy(PHOTO, tmp_path / "image.jpg")
    curl = ["bash", "-c", page.text("curl").replace("curl", "curl -s --noproxy '*'", 1)]
    python = [sys.executable, "-c", page.text("python")]
    for command in (curl, python):
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert "unconditional" in shown and label in shown, command
    assert page.complaints() == []


def test_an_example_is_answered(browser: Any, asgi: Asgi) -> None:
    """By the keyboard; it is one of the bank's own images, so the nearest one is itself."""
    page = Page(browser, asgi.base)
    page.until("document.querySelectorAll('#examples img').length === 4")
    page.until("document.querySelectorAll('#bundle option').length")
    page.browser.execute_script("bundle.selectedIndex = 1")
    example = browser.find_element("css selector", "#examples button")
    row = int(example.get_attribute("aria-label").split()[1])
    example.send_keys("\n")
    assert page.until("document.body.dataset.shown") == "one"
    nearest = page.until(PICTURES)[0]
    names = CLIENT.get(f"{asgi.base}/v1/map/one/1").json()["names"]
    assert nearest[0] == names[row] and float(nearest[2]) > 0.9
    assert page.complaints() == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1180)])
def test_it_fits_the_screen_and_its_colors(browser: Any, asgi: Asgi, scheme: str, width: int) -> None:
    with screen(browser, scheme, width):
        page = Page(browser, asgi.base)
        page.until("document.querySelectorAll('#bundle option').length")
        page.pick("second", "two")
        page.choose(PHOTO)
        page.until("document.body.dataset.shown")
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert page.until(fits)
        page.press("inside")
        page.until("inside.dataset.shown")
        assert page.until(fits)
        page.press("improve")
        page.until("kept.textContent")
        assert page.until(fits)
        page.press("overview")
        page.until("document.querySelectorAll('#cards section').length")
        assert page.until(fits)
        back, ink = page.until(LIGHTNESS)
        assert (back > 0.9 and ink < 0.3) if scheme == "light" else (back < 0.2 and ink > 0.8)


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(browser: Any, asgi: Asgi) -> None:
    """In all views, as a screen reader says it."""
    from selenium.webdriver import ActionChains

    page = Page(browser, asgi.base)
    page.until("document.querySelectorAll('#bundle option').length")
    page.choose(PHOTO)
    page.until("document.body.dataset.shown")
    for view, ready in (
        ("try", "document.body.dataset.shown"),
        ("overview", "document.querySelectorAll('#cards section').length"),
        ("inside", "inside.dataset.shown"),
        ("improve", "kept.textContent"),
    ):
        page.press(view)
        controls = page.until(f"{ready} && {CONTROLS}")
        nameless = [e.get_attribute("outerHTML") for e in controls if not e.accessible_name]
        assert not nameless, view
        for _ in range(len(controls) + 4):
            ActionChains(browser).send_keys(TAB).perform()
            browser.execute_script("document.activeElement.dataset.reached = 1")
            if not (left := browser.execute_script(f"return {UNREACHED}")):
                break
        assert not left, view


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_batch_job_looks_like_it(
    browser: Any, engine: Engine, indexed: list[Path], tmp_path: Path, scheme: str
) -> None:
    """On a phone, with all its pictures."""
    (tmp_path / "no.png").write_bytes(b"no image")
    summary = predict_files(engine, [*indexed, tmp_path / "no.png"], tmp_path / "out", embedding="float16")
    report.write(summary, files_of(tmp_path / "out"), summary.trained, tmp_path / "report.html")
    with screen(browser, scheme, 390):
        browser.get((tmp_path / "report.html").as_uri())
        back, ink = browser.execute_script("return " + LIGHTNESS.replace("#cards section", "main section"))
        assert (back > 0.9 and ink < 0.3) if scheme == "light" else (back < 0.2 and ink > 0.8)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        headings = [heading.text for heading in browser.find_elements("css selector", "h2")]
        assert {"Clusters", "Errors", "Embedding map", "Near-duplicates", "Outliers"} <= {*headings}
        shown = "return [...document.images].filter(i => i.complete && i.naturalWidth && i.alt).length"
        assert browser.execute_script(shown) >= 2 * len(indexed), "in its contact sheet, and as an outlier"


def test_names_are_text_and_nothing_comes_from_elsewhere(browser: Any, asgi: Asgi) -> None:
    for path, kind in (
        ("/", "html"),
        ("/ui", "html"),
        ("/docs", "html"),
        ("/ui/style.css", "css"),
        *((f"/ui/{n}", "javascript") for n in ui.FILES if n.endswith("js")),
    ):
        answer = CLIENT.get(asgi.base + path)
        assert answer.headers["content-type"].startswith(f"text/{kind}")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "innerHTML" not in answer.text and "http://" not in answer.text and "https://" not in answer.text
    browser.get(f"{asgi.base}/docs")
    page = Page.__new__(Page)
    page.browser = browser
    assert page.until("document.querySelectorAll('details').length") > 8
    assert "/v1/predict" in page.text("paths")
    assert page.complaints() == []


def test_what_masks_switch_off(browser: Any, asgi: Asgi, bundle_path: Path) -> None:
    """By stage and by layer, alone and against another mask; by the keyboard."""
    bundle = read(bundle_path)
    page = Page(browser, asgi.base)
    page.until("before && before.bundles.length")
    page.press("overview")
    browser.find_element("css selector", "[aria-label='Look inside one 1']").send_keys("\n")
    assert page.until("inside.dataset.shown") == "one"
    card = bundle.card.masks[0]
    off = f"switches off {percent(1 - card.density)} of {card.weights:,} weights from blocks.6 on"
    assert off in page.text("summary")
    stages = browser.find_elements("css selector", "#layers summary")
    assert [stage.text.split()[0] for stage in stages] == ["blocks.6", "conv_head"]
    assert not browser.find_element("css selector", "#layers details > div").is_displayed()
    stages[0].send_keys("\n")
    layers = browser.find_element("css selector", "#layers details > div").text
    assert "0.conv_pw" in layers and "%" in layers
    page.pick("against", "its expert-1")
    page.until("layers.dataset.shown.includes('expert-1')")
    differ = f"they differ in {percent(bundle.card.masks[2].differs_from_dispatcher)} of the weights"
    assert differ in page.text("summary") and "only one 1, expert-1" in page.text("key-masks")
    page.pick("against", "two 1")
    page.until("layers.dataset.shown.includes('two')")
    assert "they differ in 0.0 %" in page.text("summary"), "it is the same bundle under another name"
    assert page.complaints() == []


def test_map_clusters_and_confidence(browser: Any, asgi: Asgi, bundle_path: Path) -> None:
    bundle = read(bundle_path)
    assert bundle.map is not None
    names, labels = bundle.banks["conditional"].names, bundle.banks["conditional"].labels
    page = Page(browser, asgi.base)
    page.until("before && before.bundles.length")
    page.press("inside")
    assert page.until("inside.dataset.shown") == "one"
    assert "100 training images, colored by 10 labels" in browser.find_element("id", "plane").get_attribute(
        "aria-label"
    )
    assert all(name in page.text("colors") for name in bundle.card.classes)
    drawn = "new Set(plane.getContext('2d').getImageData(0, 0, 1400, 700).data).size"
    assert page.until(drawn) > 50, "colors on the map"
    for row in (0, 1):  # from one dot to the next, by the keyboard
        browser.find_element("id", "plane").send_keys(ARROW_RIGHT)
        cluster = int(bundle.map.clusters[row])
        assert page.until(f"spot.textContent.startsWith('{labels[row]}: {names[row]}, cluster {cluster}')")
        assert page.until("spot.querySelector('img')?.naturalWidth") == 32
    page.pick("color", "cluster")
    assert all(f"cluster {k}" in page.text("colors") for k in set(bundle.map.clusters.tolist()))
    groups = browser.find_elements("css selector", "#groups h3")
    sizes = [int((bundle.map.clusters == k).sum()) for k in range(3)]
    assert [g.text for g in groups] == [f"cluster {k}: {n} of 100" for k, n in enumerate(sizes) if n]
    assert page.until("[...document.querySelectorAll('#groups img')].length") == sum(min(8, n) for n in sizes)
    sure = page.text("sure")
    reliability = bundle.card.accuracy["reliability"]
    assert f"{sum(reliability['labels']['counts'])} images" in sure and "Clusters: the share that stays" in sure
    assert "Dispatch: the share of its own images that reaches it" in sure and "Not measured" not in sure
    page.pick("looked", "two 1")
    assert page.until("inside.dataset.shown === 'two'")
    assert (
        "was made without a map" in page.text("spot") and len(browser.find_elements("css selector", "#groups h3")) == 10
    )
    assert page.complaints() == []


def test_two_bundles_side_by_side(browser: Any, asgi: Asgi) -> None:
    page = Page(browser, asgi.base)
    page.until("document.querySelectorAll('#bundle option').length")
    page.pick("bundle", "one 1")
    page.pick("second", "two 1")
    page.choose(PHOTO)
    assert page.until("document.body.dataset.shown") == "one"
    assert page.text("verdict").startswith("Both say ")
    one, two = page.text("side-one"), page.text("side-two")
    assert one.startswith("one 1\n") and two.startswith("two 1\n") and "answered by\ntwo 1, conditional" in two
    assert (
        browser.find_element("css selector", "#side-two meter")
        .get_attribute("aria-label")
        .startswith("more unusual than")
    )
    page.pick("second", "nothing")
    page.until("document.body.dataset.shown && compared.hidden")
    assert page.complaints() == []


def test_several_images_are_chosen_from(browser: Any, asgi: Asgi, indexed: list[Path]) -> None:
    page = Page(browser, asgi.base)
    page.until("document.querySelectorAll('#bundle option').length")
    page.browser.execute_script("bundle.selectedIndex = 1")
    browser.find_element("id", "file").send_keys("\n".join(map(str, indexed[:3])))
    page.until("document.body.dataset.shown")
    first, *_, last = browser.find_elements("css selector", "#batch button")
    assert page.until("document.querySelectorAll('#batch img').length") == 3
    assert first.get_attribute("aria-pressed") == "true"
    page.browser.execute_script("delete document.body.dataset.shown")
    last.send_keys("\n")
    assert page.until("document.body.dataset.shown") == "one" and last.get_attribute("aria-pressed") == "true"
    label = CLIENT.post(
        f"{asgi.base}/v1/predict", content=indexed[2].read_bytes(), headers={"X-Cascade-Bundle": "one"}
    ).json()["labels"][0]
    assert f"{label['name']}\n{label['score']:.2f}" in page.text("labels")


@pytest.fixture(scope="module")
def keyed(store: Path, cifar: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asgi]:
    """A server with keys and a bundle of two input sizes, which keeps images that fit no bundle."""
    folder = tmp_path_factory.mktemp("keyed")
    store = shutil.copytree(store, folder / "store")
    write(two_sizes(cifar[:20], threshold=1.0), store / "sizes" / "1")
    keys = (("*", "mine", ""), ("*", "admin", "role=admin"), ("one", "secret", ""), ("sizes", "secret", ""))
    lines = (f"{name} {digest(key)} {role}\n" for name, key, role in keys)
    (folder / "keys").write_text("".join(lines))
    options = ("--api-keys", str(folder / "keys"), "--keep-unknown", str(folder / "unknown"))
    with serving_asgi(store, *options) as server:
        yield server


def test_strangers_are_shown_to_admins_and_downloaded(browser: Any, asgi: Asgi, keyed: Asgi, tmp_path: Path) -> None:
    """As an archive of a folder, which is what a training reads."""
    page = Page(browser, asgi.base)
    page.press("improve")
    assert page.until("kept.textContent").startswith("Only an admin may see them")
    refused = 0
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out := BytesIO(), "png")
        key = {"Authorization": "Bearer mine"}
        refused += CLIENT.post(f"{keyed.base}/v1/predict", content=out.getvalue(), headers=key).status_code == 422
    assert refused == 3, "noise fits no bundle"
    page = Page(browser, keyed.base)
    browser.find_element("id", "key").send_keys("mine\t")
    page.press("improve")
    assert "role=admin" in page.until("refused.textContent || kept.textContent")
    browser.find_element("id", "key").clear()
    browser.find_element("id", "key").send_keys("admin\t")
    assert page.until("document.querySelectorAll('#strangers img').length") == 3
    assert page.text("kept").startswith("3 are kept")
    browser.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.find_element("id", "download").send_keys("\n")
    assert "cascade train" in page.until("train.textContent")
    page.wait((tmp_path / "unknown.tar").exists)
    with tarfile.open(tmp_path / "unknown.tar") as archive:
        assert len(archive.getnames()) == 3 and all(name.startswith("unknown/") for name in archive.getnames())
    assert page.complaints() == []


def test_page_with_keys(browser: Any, keyed: Asgi) -> None:
    """And which of two input sizes has answered."""
    page = Page(browser, keyed.base)
    assert "API key" in page.until("document.getElementById('error').textContent")
    page.browser.find_element("id", "key").send_keys("secret\t")
    assert page.until("document.querySelectorAll('#bundle option').length") == 3, "both, and auto"
    page.select("one")
    page.choose(PHOTO)
    assert page.until("document.body.dataset.shown") == "one"
    assert len(page.until(PICTURES)) == 5 and "px" not in page.text("facts")
    page.select("sizes")
    assert page.until("document.body.dataset.shown === 'sizes'")
    assert "64 px, asked again: the smaller size was unsure" in page.text("facts")
    assert CLIENT.get(f"{keyed.base}/v1/thumbnails/one/1/0").status_code == 401
    assert "secret" not in keyed.log()
