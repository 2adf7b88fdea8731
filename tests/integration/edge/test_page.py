"""The device's page in a browser: every view, at the width of a desk and of a phone, while a real device works.

One household serves all tests of this file; they run in order. Screenshots are written to the folder that
ISTHMUS_SCREENSHOTS names, else to the test's own.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the page needs isthmus[page]")

from tests.rigs.edge.household import VIEWS, Household, chromium, household
from tests.rigs.project.system import missing

WIDTHS = {1280: 900, 360: 740}
PATIENCE_MS = 300_000
TOO_SMALL = """
() => [...document.querySelectorAll('a, button, select, summary, audio')]
    .filter((each) => each.offsetParent !== null && !each.matches('.skip'))
    .filter((each) => each.getBoundingClientRect().height < 43.9)
    .map((each) => each.outerHTML.slice(0, 120))
"""
ASK = """
async (wanted) => (await (await fetch('./api/do', {
    method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify(wanted)
})).json())
"""
FAINT = """
() => {
    const canvas = document.createElement('canvas').getContext('2d');
    const luminance = (colour) => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const linear = [...canvas.getImageData(0, 0, 1, 1).data].map((level) => level / 255)
            .map((share) => share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05;
    };
    return [...document.querySelectorAll('section svg rect, section svg circle')].map((each) => {
        const drawn = luminance(getComputedStyle(each).fill);
        const ground = luminance(getComputedStyle(each.closest('section')).backgroundColor);
        return Math.max(drawn, ground) / Math.min(drawn, ground);
    }).filter((contrast) => contrast < 3);
}
"""
FOCUSED = """
() => document.activeElement.matches('a, button, select, summary')
    ? document.activeElement.ariaLabel || document.activeElement.textContent : ''
"""
BLANK = (
    "(canvas) => !canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((level) => level)"
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def home(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Household]:
    with household(tmp_path_factory.mktemp("household")) as home:
        yield home


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("ISTHMUS_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Visit:
    """A page that is open in the browser, and everything that went wrong on it."""

    def __init__(self, browser: Any, home: Household, view: str, width: int = 1280) -> None:
        self.trouble: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]}, reduced_motion="reduce")
        self.page.set_default_timeout(PATIENCE_MS)
        origin = "/".join(home.address.split("/")[:3])
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.trouble.append(said.text))
        self.page.on("request", lambda asked: asked.url.startswith((origin, "data:", "blob:")) or self.off(asked.url))
        self.page.goto(f"{home.address}#{view}")

    def off(self, url: str) -> None:
        self.trouble.append(f"a request off the page's origin: {url}")

    def shows(self, where: str, text: str) -> None:
        self.page.locator(where, has_text=text).first.wait_for()

    def tab_to(self, name: str, most: int = 80) -> None:
        """Press Tab until the element with this name has the focus."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if name in self.page.evaluate(FOCUSED):
                return
        pytest.fail(f"Tab never reached {name!r}")

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


def test_now_shows_what_the_device_sees_and_answers(browser: Any, home: Household) -> None:
    with Visit(browser, home, "now") as visit:
        visit.shows("#state", "This device runs")
        visit.shows("section[aria-label=Answer]", "Answered by")
        visit.shows("section[aria-label='What happened']", "Answered by")
        visit.shows("section[aria-label=Sound]", "The last 1.0 s of sound")
        visit.shows("section[aria-label='Answers over time']", "oldest first")
        for canvas in visit.page.locator("canvas").all():
            assert not canvas.evaluate(BLANK)
        assert "probabilities: NEU" in visit.page.locator("section[aria-label=Answer] svg").get_attribute("aria-label")
        visit.shows("section[aria-label=Answer]", "Answered by the cloud")  # by the finished student
        assert not visit.trouble


def test_what_left_the_device_is_what_the_wire_carried(browser: Any, home: Household) -> None:
    with Visit(browser, home, "mine") as visit:
        # Camera and microphone closed: no further clip is asked of the cloud while we compare.
        visit.page.get_by_role("button", name="Pause capture").click()
        visit.shows("main", "Capture is paused")
        visit.page.goto(f"{home.address}#now")
        visit.shows("section[aria-label=Camera]", "Capture is paused")
        visit.page.goto(f"{home.address}#sent")
        visit.shows("main", "features of one clip")
        listed = visit.page.evaluate(ASK, {"request": "sent", "arguments": {"before": 0, "most": 200}})
        carried = home.tap.messages()
        assert len(listed["messages"]) == len(carried) == sum(number for number, _ in listed["totals"].values())
        assert sum(each["size_bytes"] for each in listed["messages"]) == sum(map(len, carried))
        enrolments = [each for each in listed["messages"] if each["name"] == "EnrolRequest"]
        hashes = Counter(hashlib.sha256(message).hexdigest() for message in carried)
        said = Counter(each["sha256"] for each in listed["messages"] if each["sha256"])
        assert len(enrolments) == 1 and sum((hashes - said).values()) == 1, "all but the enrolment, which has no hash"
        assert not said - hashes
        item = visit.page.locator("li", has_text="features of one clip").first
        item.locator("summary").click()
        item.get_by_role("button", name="show the").click()
        shown = item.locator("pre").text_content().replace(" ", "")
        assert bytes.fromhex(shown) in carried
        assert item.locator("svg").count() >= 1
        visit.page.goto(f"{home.address}#mine")
        visit.page.get_by_role("button", name="Go on capturing").click()
        visit.shows("main", "Capture is on")
        assert not visit.trouble


def test_a_person_corrects_rolls_back_and_deletes_by_keyboard(browser: Any, home: Household) -> None:
    with Visit(browser, home, "now") as visit:
        keys = visit.page.keyboard
        visit.tab_to("Mine")
        keys.press("Enter")
        visit.shows("main", "A student of your own answers")
        visit.tab_to("Ask me about a clip")
        keys.press("Enter")
        visit.shows("#said", "This device thinks")
        visit.page.locator("#asked:focus").wait_for()  # the focus is on the choice already
        keys.type("SAD")
        visit.tab_to("say what", 1)
        keys.press("Enter")
        visit.shows("#said", "was SAD")
        visit.shows("section[aria-label=Corrections] td", "SAD")
        visit.tab_to("Take back the newest")
        keys.press("Enter")
        visit.shows("#said", "Taken back")
        visit.tab_to("Roll back")
        keys.press("Enter")
        visit.shows("#said", "answers now")
        keys.press("Enter")
        visit.shows("#said", "(final) answers now")
        visit.tab_to("sound and picture")
        keys.press("Enter")
        visit.page.locator("details[open] img").wait_for()
        assert visit.page.locator("details[open] img").evaluate(
            "(image) => image.decode().then(() => image.naturalWidth)"
        )
        gone = visit.page.locator("details[open]").get_by_role("button", name="delete").get_attribute("aria-label")
        visit.tab_to(gone)
        keys.press("Enter")
        visit.shows("#said", "is deleted")
        assert not list((home.state / "clips").glob(f"{gone.removeprefix('delete ')}*"))
        assert not visit.trouble


def test_every_view_fits_a_desk_and_a_phone(browser: Any, home: Household, pictures: Path) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ModuleNotFoundError:
        missing("the check of accessibility needs the package axe-playwright-python")
    with Visit(browser, home, "link") as visit:  # charts of several points are judged, and shown in the docs
        visit.page.locator("section[aria-label='Round trips'] circle").nth(7).wait_for()
    for width in WIDTHS:
        with Visit(browser, home, "now", width) as visit:
            visit.shows("section[aria-label='Answers over time']", "oldest first")
            for view in VIEWS:
                visit.page.locator(f"nav a[href='#{view}']").click()
                visit.page.locator("main section >> nth=-1").wait_for()
                visit.page.wait_for_load_state("load")
                visit.shows(
                    "main", {"now": "Answered by", "mine": "Capture is on", "sent": "bytes", "link": "asked"}[view]
                )
                assert visit.page.evaluate("scrollY") == 0, f"the view {view} begins at its top"
                assert visit.page.evaluate("document.documentElement.scrollWidth") <= width, view
                assert visit.page.evaluate(FAINT) == [], "what is drawn has a contrast of at least 3"
                assert visit.page.evaluate(TOO_SMALL) == [], view
                found = Axe().run(visit.page).response["violations"]
                assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], (view, width)
                visit.page.evaluate("scrollTo(0, 0)")
                visit.page.screenshot(path=str(pictures / f"{view}-{width}.png"), full_page=False)
            visit.page.emulate_media(color_scheme="dark")
            assert visit.page.evaluate(FAINT) == [], "dark"
            assert Axe().run(visit.page).response["violations"] == [], "dark"
            assert not visit.trouble


def test_what_happens_again_and_again_is_one_line(browser: Any, home: Household) -> None:
    """An empty room is withheld with every clip; and with both sources gone neither is said to be answered alone."""
    nobody = [{"kind": "withheld", "at_s": at_s, "reason": "nobody here"} for at_s in (1e9, 1e9 + 4, 1e9 + 8)]
    told = {
        "device": {"running": True, "problem": ""},
        "hello": [{"kind": "trouble", "at_s": 9e8, "text": "the camera is gone"}, *nobody],
        "look": {"view": {"picture": None, "sound": None}},
    }
    body = "".join(f"event: {kind}\ndata: {json.dumps(facts)}\n\n" for kind, facts in told.items())
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.route("**/api/watch*", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.goto(f"{home.address}#now")
    happened = page.locator("section[aria-label='What happened'] li")
    happened.first.wait_for()
    newest, before = happened.all_text_contents()
    assert "Withheld: nobody here" in newest and "(3 times since " in newest
    assert "the camera is gone" in before and "times" not in before
    page.locator("section[aria-label=Camera]", has_text="The camera gives no picture.").wait_for()
    assert "is answered" not in page.inner_text("section[aria-label=Camera]") + page.inner_text(
        "section[aria-label=Sound]"
    )
    page.close()


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"asks": False, "worth": None}, "--no-ask-cloud"),
        ({"asks": True, "worth": 0.0}, "no better than this device's own"),
        ({"asks": True, "worth": 0.1}, "a finished student alone"),
    ],
)
def test_a_cloud_that_is_not_asked_is_said_with_the_reason(
    browser: Any, home: Household, known: dict[str, Any], words: str
) -> None:
    counts = dict.fromkeys(("asked", "in_time", "late", "lost", "in_flight", "failures", "overdue_s", "chance"), 0)
    link = {**counts, **known, "samples": [], "setting": None}
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.route("**/api/do", lambda route: route.fulfill(json={"link": link, "waits_s": None}))
    page.goto(f"{home.address}#link")
    page.locator("section[aria-label='The cloud']", has_text=words).wait_for()
    page.locator("section[aria-label='The cloud']", has_text="not asked").wait_for()
    page.close()


def test_a_page_that_is_open_finds_the_device_again(browser: Any, home: Household) -> None:
    with Visit(browser, home, "now") as first, Visit(browser, home, "link") as second:
        for visit in (first, second):
            visit.shows("#state", "This device runs")
        home.stop_device()
        for visit in (first, second):
            visit.shows("#state", "No device runs in")
        home.start_device()
        for visit in (first, second):
            visit.shows("#state", "This device runs")
        assert not first.trouble


def test_a_page_that_is_open_finds_its_server_again(browser: Any, home: Household) -> None:
    with Visit(browser, home, "now") as visit:
        visit.shows("#state", "This device runs")
        address, port = home.address, int(home.address.split(":")[2].partition("/")[0])
        home.close_page()
        visit.shows("#state", "The page's server does not answer")
        home.open_page(port)
        assert home.address == address, "the token is the same"
        visit.shows("#state", "This device runs")
        visit.shows("section[aria-label=Answer]", "Answered by")
        assert not [each for each in visit.trouble if "ERR_CONNECTION" not in each and "ERR_INCOMPLETE" not in each]
