"""The device's page while a real device works: how soon it is usable, how soon an answer is on it, and how it lasts.

A household of processes: cloud, device with an actor for camera and microphone, page, and Chromium. Measured are

- *usable*: from opening the address to the newest answer on the page, for each view at both widths;
- *answered*: from a clip's end to the frame after the answer is drawn, with the page open. The device waits 0.3 s for
  the last pictures of a clip;
- *heap*: JavaScript memory after a collection, at the first minute and at the last, with live pictures all the time;
- requests that leave the page's origin, and violations that axe-core finds.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final

import psutil
import typer

from tests.bench.harness import Report, Spread
from tests.rigs.edge.household import VIEWS, chromium, household

WIDTHS: Final = (1280, 360)
_ANSWERED: Final = """
() => { window.delays = [];
  new EventSource('./api/watch?look=0').addEventListener('event', (told) => {
    const event = JSON.parse(told.data);
    if (event.kind === 'answered')
      requestAnimationFrame(() => window.delays.push(Date.now() / 1000 - event.ended_s));
  }); }
"""
_READY: Final = {"now": "Answered by", "mine": "Capture is on", "sent": "messages", "link": "asked the cloud"}


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes for which the page stays open.")] = 30.0,
    loads: Annotated[int, typer.Option(min=1, help="How often each view is opened.")] = 5,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure the device's page."""
    from axe_playwright_python.sync_playwright import Axe

    report = Report("device page", {"minutes": minutes, "loads": loads}, ("starlette", "uvicorn", "playwright"))
    with tempfile.TemporaryDirectory() as folder, chromium() as browser, household(Path(folder)) as home:
        origin = "/".join(home.address.split("/")[:3])
        off: list[str] = []

        def opened(width: int) -> Any:
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.set_default_timeout(300_000)
            page.on("request", lambda asked: asked.url.startswith((origin, "data:", "blob:")) or off.append(asked.url))
            return page

        first = opened(1280)
        first.goto(f"{home.address}#now")
        first.locator("section", has_text="Answered by the cloud").first.wait_for()
        first.close()
        violations = 0
        for view in VIEWS:
            took_s = []
            for width in WIDTHS:
                for _ in range(loads):
                    page = opened(width)
                    began_s = time.perf_counter()
                    page.goto(f"{home.address}#{view}")
                    page.locator("main", has_text=_READY[view]).wait_for()
                    took_s.append(time.perf_counter() - began_s)
                    page.close()
                page = opened(width)
                page.goto(f"{home.address}#{view}")
                page.locator("main", has_text=_READY[view]).wait_for()
                violations += len(Axe().run(page).response["violations"])
                page.close()
            report.rows.append({"what": f"usable: {view}", "unit": "s", **_spread(took_s)})
        page = opened(1280)
        page.goto(f"{home.address}#now")
        page.locator("main", has_text="Answered by").wait_for()
        page.evaluate(_ANSWERED)
        tools = page.context.new_cdp_session(page)
        heaps_mb: list[float] = []
        for _ in range(max(2, round(minutes) + 1)):
            page.wait_for_timeout(minutes * 60_000 / max(1, round(minutes)) if heaps_mb else 30_000)
            tools.send("HeapProfiler.collectGarbage")
            heaps_mb.append(tools.send("Runtime.getHeapUsage")["usedSize"] / 1e6)
        report.rows.append({"what": "answered", "unit": "s", **_spread(page.evaluate("window.delays"))})
        report.rows.append({"what": "heap", "unit": "MB", **_spread(heaps_mb)})
        served = [each for each in psutil.Process().children(recursive=True) if "page" in each.cmdline()]
        report.floors = {
            "heap growth, MB": heaps_mb[-1] - heaps_mb[0],
            "memory of the page's server, MiB": sum(each.memory_info().rss for each in served) / (1 << 20),
            "requests off the origin": len(off),
            "violations by axe-core": violations,
        }
        page.close()
    report.finish(
        {
            "what": lambda row: row["what"],
            "median": lambda row: f"{row['median']:.2f} {row['unit']}",
            "largest": lambda row: f"{row['largest']:.2f} {row['unit']}",
            "of": lambda row: str(row["repeats"]),
        },
        out,
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {**Spread.of(values).to_json(), "largest": max(values)}


if __name__ == "__main__":
    typer.run(main)
