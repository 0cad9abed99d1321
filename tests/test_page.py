"""The demo page in a real headless Chromium against a real server, as a visitor uses it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from starlette.testclient import TestClient

from model_store.images import psnr
from service.app import create_app
from service.codec.bitstream import Bitstream
from service.engine import Photo
from service.imaging import read_photo
from service.settings import Settings
from tests.conftest import image_bytes, noisy
from tests.served import served

if TYPE_CHECKING:
    from playwright import sync_api as playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

playwright.expect.set_options(timeout=60_000)
SHOTS = Path(__file__).parents[1] / "docs" / "screenshots"
WIDTHS = {"phone": (390, 844), "tablet": (820, 1180), "desk": (1440, 900)}
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with served() as (base, _):
        yield base


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here; `make test` installs Debian's where it may")
    assert chromium, "no Chromium here"
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser, base: str) -> Iterator[playwright.Page]:
    """A fresh visit; a message of the console (a broken policy, a missing file) fails the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    foreign: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((base, "blob:")) else foreign.append(r.url))
    page.goto(base)
    playwright.expect(page.locator("#rate-text")).to_contain_text("bits per pixel")
    yield page
    assert not foreign
    assert not [text for text in complaints if "status of 4" not in text]
    page.close()


def upload(page: playwright.Page, name: str, data: bytes, kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def done(page: playwright.Page) -> None:
    playwright.expect(page.locator("#status")).to_have_text("Done.")


def saved(page: playwright.Page, link: str) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.click(link)
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def test_an_upload_comes_back_clean_and_can_be_saved(page: playwright.Page, parrots: Photo) -> None:
    degraded = noisy(parrots)
    upload(page, "camera.png", image_bytes(degraded))
    done(page)
    name, data = saved(page, "#save-stream")
    stream = Bitstream.from_bytes(data)
    assert (name, stream.rate, stream.width) == ("camera.lmp", 4, 256)
    assert page.inner_text("#fact-stream") == f"{len(data)} bytes"
    assert float(page.inner_text("#fact-bpp")) == pytest.approx(8 * len(data) / 256**2, abs=0.001)
    for stage in ("image_decode", "queue", "transform", "entropy"):
        assert stage in page.inner_text("#fact-compress")
    name, data = saved(page, "#save-photo")
    assert name == "camera-clean.png"
    assert psnr(read_photo(data, 10**6), parrots) > psnr(degraded, parrots) + 3


def test_the_slider_chooses_the_rate_point_by_keyboard(page: playwright.Page, bikes: Photo) -> None:
    upload(page, "a.png", image_bytes(bikes))
    done(page)
    small = page.inner_text("#fact-stream")
    page.focus("#rate")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#fact-model")).to_have_text(re.compile("rate 8"))
    assert re.match(r"8, about 0\.\d\d to 0\.\d\d bits per pixel", page.inner_text("#rate-text"))
    assert page.inner_text("#fact-stream") != small


@pytest.mark.parametrize("most", [0, 3])
def test_effort_is_offered_as_far_as_it_is_allowed(
    browser: playwright.Browser, base: str, bikes: Photo, most: int
) -> None:
    page = browser.new_page()
    page.route("**/variants", lambda route: route.fulfill(status=503))  # it is loading
    page.goto(base)
    playwright.expect(page.locator("#effort-text")).to_have_text("none")
    playwright.expect(page.locator("#effort-field")).to_be_hidden()
    page.unroute("**/variants")
    page.route("**/variants", lambda route: route.fulfill(json={**route.fetch().json(), "max_effort": most}))
    upload(page, "a.png", image_bytes(bikes))
    done(page)
    playwright.expect(page.locator("#rate-text")).to_contain_text("bits per pixel")
    playwright.expect(page.locator("#effort-field")).to_be_visible(visible=most > 0)
    if most:
        plain = page.inner_text("#fact-stream")
        page.focus("#effort")
        page.keyboard.press("End")
        playwright.expect(page.locator("#effort-text")).to_have_text("3")
        playwright.expect(page.locator("#fact-stream")).not_to_have_text(plain)
        page.route("**/compress*", lambda route: route.fulfill(status=504, body="too late"))
        page.keyboard.press("ArrowLeft")
        playwright.expect(page.locator("#error")).to_have_text("too late. Less effort takes less time.")
    page.close()


def canvas_colour(page: playwright.Page, x: float, y: float) -> list[int]:
    """The canvas' colour at a place given as shares of its size."""
    colour: list[int] = page.evaluate(
        """([x, y]) => { const c = document.getElementById("canvas");
        return [...c.getContext("2d").getImageData(x * c.width, y * c.height, 1, 1).data].slice(0, 3); }""",
        [x, y],
    )
    return colour


def roughness(page: playwright.Page, left: float, right: float) -> float:
    """Mean difference of neighbouring pixels of the canvas between two shares of its width: noise is rough."""
    value: float = page.evaluate(
        """([left, right]) => { const c = document.getElementById("canvas"), w = Math.floor((right - left) * c.width);
        const d = c.getContext("2d").getImageData(left * c.width, 0.3 * c.height, w, 0.4 * c.height).data;
        let sum = 0;
        for (let i = 4; i < d.length; i += 4) sum += Math.abs(d[i] - d[i - 4]);
        return sum / d.length; }""",
        [left, right],
    )
    return value


def test_the_divider_moves_by_mouse_and_keyboard_and_shows_before_and_after(page: playwright.Page) -> None:
    page.click("button[data-sample=noise]")
    done(page)
    assert roughness(page, 0.3, 0.48) > 1.5 * roughness(page, 0.52, 0.7)
    box = page.locator("#viewer").bounding_box()
    assert box
    middle = box["y"] + box["height"] / 4
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, middle, steps=5)
    page.mouse.up()
    assert page.get_attribute("#viewer", "aria-valuenow") == "90"
    rough = roughness(page, 0.52, 0.7)
    page.focus("#viewer")
    page.keyboard.press("Home")
    assert page.get_attribute("#viewer", "aria-valuenow") == "0"
    assert rough > 1.5 * roughness(page, 0.52, 0.7)
    before = canvas_colour(page, 0.5, 0.5)
    for _ in range(8):
        page.keyboard.press("+")
    page.keyboard.press("Shift+ArrowRight")
    assert canvas_colour(page, 0.5, 0.5) != before or canvas_colour(page, 0.4, 0.5) != before
    page.keyboard.press("0")
    assert canvas_colour(page, 0.5, 0.5) == before


def test_an_error_is_shown_as_the_service_words_it(page: playwright.Page, bikes: Photo, base: str) -> None:
    upload(page, "no.png", b"this is no picture")
    detail = httpx2.post(f"{base}/compress", content=b"this is no picture").json()["detail"]
    playwright.expect(page.locator("#error")).to_contain_text(detail)
    upload(page, "yes.png", image_bytes(bikes))
    done(page)
    playwright.expect(page.locator("#error")).to_be_hidden()


def test_what_fails_leaves_no_facts_of_before(browser: playwright.Browser, base: str, bikes: Photo) -> None:
    page = browser.new_page()
    page.goto(base)
    upload(page, "yes.png", image_bytes(bikes))
    done(page)
    said = (
        (lambda route: route.abort(), "The service cannot be reached."),
        (lambda route: route.fulfill(status=502, body='{"error": "upstream"}'), '{"error": "upstream"}'),
    )
    for answer, words in said:
        page.route("**/compress*", answer)
        page.focus("#rate")
        page.keyboard.press("ArrowRight")
        playwright.expect(page.locator("#error")).to_have_text(words)
        for gone in ("#downloads", "#facts"):
            playwright.expect(page.locator(gone)).to_be_hidden()
        page.unroute("**/compress*")
    page.route("**/samples/*", lambda route: route.abort())
    page.click("button[data-sample=noise]")
    playwright.expect(page.locator("#error")).to_have_text("The service cannot be reached.")
    page.close()


def test_what_came_can_be_saved_whatever_becomes_of_the_rest(page: playwright.Page, bikes: Photo) -> None:
    page.route("**/decompress", lambda route: route.fulfill(status=422, body="too late"))
    upload(page, "camera.png", image_bytes(bikes))
    playwright.expect(page.locator("#error")).to_have_text("too late")
    playwright.expect(page.locator("#save-photo")).to_be_hidden()
    name, data = saved(page, "#save-stream")
    assert (name, Bitstream.from_bytes(data).width) == ("camera.lmp", bikes.shape[1])
    page.unroute("**/decompress")
    page.evaluate(
        """() => { const shows = createImageBitmap, fails = () => Promise.reject(new Error("too large"));
        window.createImageBitmap = one => one instanceof File ? shows(one) : fails(); }"""
    )
    page.focus("#rate")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#status")).to_contain_text("cannot show the clean photo, but it can be saved")
    assert read_photo(saved(page, "#save-photo")[1], 10**6).shape == bikes.shape


def test_who_waits_for_a_busy_service_is_told(page: playwright.Page, bikes: Photo) -> None:
    refusals = iter([429, 429])

    def answer(route: playwright.Route) -> None:
        status = next(refusals, None)
        if status is None:
            route.continue_()
        else:
            route.fulfill(status=status, headers={"Retry-After": "1"}, body="busy")

    page.route("**/compress*", answer)
    upload(page, "camera.png", image_bytes(bikes))
    playwright.expect(page.locator("#status")).to_have_text("The service is busy. Trying again in 1 s...")
    done(page)
    assert next(refusals, None) is None


def test_a_photo_cannot_be_lost_from_its_frame(page: playwright.Page) -> None:
    page.click("button[data-sample=noise]")
    done(page)
    page.focus("#viewer")
    seen = [canvas_colour(page, x, y) for x, y in ((0.1, 0.1), (0.9, 0.9))]
    for key in ["-"] * 20 + ["Shift+ArrowRight", "Shift+ArrowDown"] * 20:
        page.keyboard.press(key)
    assert [canvas_colour(page, x, y) for x, y in ((0.1, 0.1), (0.9, 0.9))] == seen
    for key in ["+"] * 5 + ["Shift+ArrowRight", "Shift+ArrowDown"] * 80:
        page.keyboard.press(key)
    painted = page.evaluate(
        """() => { const c = document.getElementById("canvas");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return d.filter((level, index) => index % 4 === 3 && level === 255).length / (c.width * c.height); }"""
    )
    assert painted == 1


def test_a_bitstream_file_opens_directly(page: playwright.Page, bikes: Photo, base: str) -> None:
    data = httpx2.post(f"{base}/compress", content=image_bytes(bikes)).content
    upload(page, "from-elsewhere.lmp", data, "application/octet-stream")
    done(page)
    assert page.inner_text("#fact-stream") == f"{len(data)} bytes"
    assert saved(page, "#save-photo")[0] == "from-elsewhere-clean.png"
    for control in ("#rate", "#worse input >> nth=0", "#strength"):  # it is as it was written
        playwright.expect(page.locator(control)).to_be_disabled()
    upload(page, "cut.lmp", data[:50], "application/octet-stream")
    playwright.expect(page.locator("#error")).to_contain_text("orrupt bitstream")
    for gone in ("#downloads", "#facts", "#tag-after"):
        playwright.expect(page.locator(gone)).to_be_hidden()
    playwright.expect(page.locator("#empty")).to_be_visible()  # nothing of the photo before


def test_a_bitstream_waits_for_its_key(browser: playwright.Browser, base: str, bikes: Photo, guarded: str) -> None:
    data = httpx2.post(f"{base}/compress", content=image_bytes(bikes)).content
    page = browser.new_page()
    page.goto(guarded)
    upload(page, "kept.lmp", data, "application/octet-stream")
    playwright.expect(page.locator("#error")).to_contain_text("API key")
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    done(page)
    playwright.expect(page.locator("#error")).to_be_hidden()
    playwright.expect(page.locator("#rate-text")).to_contain_text("bits per pixel")
    page.close()


def test_a_key_that_no_header_carries_is_told(browser: playwright.Browser, bikes: Photo, guarded: str) -> None:
    page = browser.new_page()
    page.goto(guarded)
    upload(page, "a.png", image_bytes(bikes))
    playwright.expect(page.locator("#error")).to_contain_text("API key")
    page.fill("#key", "ключ")
    page.press("#key", "Enter")
    playwright.expect(page.locator("#error")).to_contain_text("visible ASCII")
    page.close()


def test_a_file_that_goes_meanwhile_is_kept_and_one_that_cannot_be_read_is_told(
    page: playwright.Page, bikes: Photo, tmp_path: Path
) -> None:
    path = tmp_path / "camera.png"
    path.write_bytes(image_bytes(bikes))
    page.set_input_files("#file", path)
    done(page)
    path.write_bytes(b"something else")
    page.focus("#rate")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#fact-model")).to_have_text(re.compile("rate 5"))
    playwright.expect(page.locator("#error")).to_be_hidden()
    page.evaluate(
        """() => { const folder = new File(["x"], "folder"), data = new DataTransfer();
        data.items.add(folder);
        File.prototype.arrayBuffer = async () => { throw new DOMException("", "NotFoundError"); };
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })); }"""
    )
    playwright.expect(page.locator("#error")).to_have_text("folder cannot be read.")


def test_a_slider_that_is_moved_while_a_sample_loads_waits_for_it(page: playwright.Page, bikes: Photo) -> None:
    upload(page, "a.png", image_bytes(bikes))
    done(page)
    held: list[playwright.Route] = []
    page.route("**/samples/*", lambda route: held.append(route))
    page.click("button[data-sample=rain]")
    page.click("button[data-sample=noise]")
    page.focus("#rate")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    held[1].continue_()
    playwright.expect(page.locator("#fact-model")).to_have_text(re.compile("rate 5"))
    done(page)
    assert saved(page, "#save-stream")[0] == "noise.lmp"


def test_the_page_works_where_the_browser_blocks_site_data(
    browser: playwright.Browser, base: str, bikes: Photo
) -> None:
    page = browser.new_page()
    page.add_init_script(
        """Object.defineProperty(window, "sessionStorage", {
        get() { throw new DOMException("denied", "SecurityError"); } });"""
    )
    page.goto(base)
    playwright.expect(page.locator("#rate-text")).to_contain_text("bits per pixel")
    upload(page, "a.png", image_bytes(bikes))
    done(page)
    page.close()


def test_pictures_are_closed_once_they_are_shown_no_more(page: playwright.Page, bikes: Photo) -> None:
    page.evaluate(
        """() => { window.open = 0; const { close } = ImageBitmap.prototype, make = createImageBitmap;
        window.createImageBitmap = async (...of) => { window.open += 1; return make(...of); };
        ImageBitmap.prototype.close = function () { window.open -= 1; close.call(this); }; }"""
    )
    for _ in range(3):
        upload(page, "bikes.png", image_bytes(bikes))
        done(page)
        playwright.expect(page.locator("#tag-after")).to_be_visible()
        page.evaluate("() => { document.getElementById('status').textContent = ''; }")
    assert page.evaluate("window.open") == 2


def test_the_keys_of_the_browser_stay_its_own(page: playwright.Page, bikes: Photo) -> None:
    upload(page, "bikes.png", image_bytes(bikes))
    done(page)
    taken = """init => !document.getElementById("viewer").dispatchEvent(
        new KeyboardEvent("keydown", { cancelable: true, ...init }))"""
    assert page.evaluate(taken, {"key": "+"})
    assert not page.evaluate(taken, {"key": "+", "ctrlKey": True})
    assert not page.evaluate(taken, {"key": "ArrowLeft", "altKey": True})


def test_a_photo_can_be_dropped_and_pasted(page: playwright.Page) -> None:
    make = """kind => fetch("page/samples/rain.jpg").then(r => r.blob()).then(blob => {
        const data = new DataTransfer(); data.items.add(new File([blob], `${kind}.jpg`, { type: "image/jpeg" }));
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                                      : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
        document.body.dispatchEvent(event); })"""
    for kind in ("drop", "paste"):
        page.evaluate(make, kind)
        playwright.expect(page.locator("#save-stream")).to_have_attribute("download", f"{kind}.lmp")
        done(page)


@pytest.mark.parametrize("kind", ["noise", "rain", "haze"])
def test_make_it_worse_makes_it_worse_and_limpid_makes_it_better(
    page: playwright.Page, parrots: Photo, kind: str
) -> None:
    upload(page, "clean.png", image_bytes(parrots))
    done(page)
    untouched = page.inner_text("#fact-upload")
    page.check(f"input[name=worse][value={kind}]")
    playwright.expect(page.locator("#fact-upload")).not_to_have_text(untouched)
    done(page)
    worse = page.evaluate(
        """async ([bytes, kind]) => { const { worsen } = await import("./page/worse.js");
        const blob = await worsen(new Blob([new Uint8Array(bytes)]), kind, 5, new AbortController().signal);
        return [...new Uint8Array(await blob.arrayBuffer())]; }""",
        [list(image_bytes(parrots)), kind],
    )
    _, data = saved(page, "#save-photo")
    assert psnr(read_photo(data, 10**6), parrots) > psnr(read_photo(bytes(worse), 10**6), parrots) + 1


def test_the_page_fits_its_screen_by_day_and_night(browser: playwright.Browser, base: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(base)
        page.click("button[data-sample=noise]")
        done(page)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for name, (width, height) in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": height})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if os.environ.get("LIMPID_SCREENSHOTS") and (scheme == "light" or name == "desk"):
                SHOTS.mkdir(exist_ok=True)
                page.screenshot(path=SHOTS / f"{name}-{scheme}.jpg", full_page=True, type="jpeg", quality=82)
        page.close()
    light, dark = (sum(map(int, re.findall(r"\d+", ground)[:3])) for ground in grounds)
    assert dark < 200 < 600 < light


def test_the_page_may_load_nothing_from_elsewhere_and_can_be_switched_off(base: str) -> None:
    policy = httpx2.get(base).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert httpx2.get(f"{base}/page/app.js").headers["content-security-policy"] == policy
    other = TestClient(create_app(Settings(demo_page=False)))  # which loads no model so
    assert other.get("/", follow_redirects=False).headers["location"] == "docs"
    assert other.get("/page/app.js").status_code == 404
