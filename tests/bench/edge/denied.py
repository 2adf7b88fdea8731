"""How soon the student in a browser says that its camera is denied or gone, and answers from the sound alone.

Chromium's fake camera and microphone play the film and the sound of a synthetic person. Both times count from the
browser's own refusal, or from the end of the camera's track, to what the page shows. The first answer after a refusal
needs the sound of a whole clip, so it counts from that clip's end.
"""

import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from isthmus.data.transforms import InputSpec
from tests.bench.harness import Report, Spread
from tests.rigs.edge.fake_devices import device_with_student, fake_devices, write_y4m
from tests.rigs.edge.household import chromium, ended, make_actor, started
from tests.rigs.edge.scene import faces

_NOTED: Final = """
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
window.moments = {};
const note = (name) => window.moments[name] ??= performance.now();
navigator.mediaDevices.getUserMedia = async (wanted) => {
  try {
    const given = await ask(wanted);
    if (given.getAudioTracks().length) note("heard");
    return window.given = given;
  } catch (error) {
    note("lost");
    throw error;
  }
};
new MutationObserver(() => {
  if (window.moments.lost === undefined) return;
  const text = (where) => document.querySelector(where)?.textContent ?? "";
  if (/camera (was not allowed|is gone)/.test(text("#state"))) note("said");
  if (text("section[aria-label=Answer]").includes("from sound,")) note("answered");
}).observe(document, {subtree: true, childList: true, characterData: true});
"""
_WAIT_S: Final = 300.0
_PULL: Final = """
() => { const [track] = window.given.getVideoTracks();
  window.moments.lost = performance.now(); track.stop(); track.dispatchEvent(new Event("ended")); }
"""


@contextmanager
def visit(browser: Any, address: str, *allowed: str) -> Any:
    """Yield the page of the student in a browser after a press on Start."""
    context = browser.new_context()
    context.grant_permissions(list(allowed))
    page = context.new_page()
    page.set_default_timeout(1_000 * _WAIT_S)
    page.add_init_script(_NOTED)
    page.goto(f"{address}browser.html")
    page.get_by_role("button", name="Start").click()
    yield page
    context.close()


def moments(page: Any) -> dict[str, float]:
    """Return the seconds at which the page has lost its camera, said so, and answered from the sound alone.

    Raises TimeoutError if it does not within ``_WAIT_S``.
    """
    until_s = time.monotonic() + _WAIT_S
    while not {"said", "answered"} <= (known := page.evaluate("moments")).keys():  # the page's policy forbids more
        if time.monotonic() > until_s:
            raise TimeoutError(f"in {_WAIT_S:g} s the page came to {', '.join(sorted(known)) or 'nothing'}")
        page.wait_for_timeout(50)
    return {name: ms / 1000 for name, ms in known.items()}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="How often the camera is denied, and pulled out.")] = 5,
    preset: Annotated[str, typer.Option(help="Size of the student.")] = "small",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures to this JSON file.")] = None,
) -> None:
    """Deny the camera, and pull it out, and say how soon the page shows it."""
    report = Report("denied", {"repeats": repeats, "preset": preset}, ("playwright",))
    found: dict[str, list[float]] = {
        f"camera {trouble}: {what}": [] for trouble in ("denied", "pulled out") for what in ("said", "answered")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = InputSpec.from_json(device_with_student(folder, preset).input_spec_json)
        _, sound = make_actor(folder)
        write_y4m(folder / "film.y4m", list(faces(20)), 10)
        server = started(["edge", "page", "--state", folder / "device", "--port", 0], folder / "page.log")
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        with chromium(*fake_devices(folder / "film.y4m", sound)) as browser:
            for _ in range(repeats):
                with visit(browser, address, "microphone") as page:
                    at_s = moments(page)
                found["camera denied: said"].append(at_s["said"] - at_s["lost"])
                found["camera denied: answered"].append(at_s["answered"] - at_s["heard"] - spec.duration_s)
                with visit(browser, address, "camera", "microphone") as page:
                    page.locator("section[aria-label=Answer]", has_text="from sound and picture").wait_for()
                    page.evaluate(_PULL)
                    at_s = moments(page)
                for what in ("said", "answered"):
                    found[f"camera pulled out: {what}"].append(at_s[what] - at_s["lost"])
        ended(server)
    for what, values in found.items():
        report.rows.append({"what": what, **Spread.of(values).to_json(), "largest": max(values)})
    report.finish(
        {
            "what": lambda row: str(row["what"]),
            "median": lambda row: f"{row['median']:.2f} s",
            "longest": lambda row: f"{row['largest']:.2f} s",
            "of": lambda row: str(row["repeats"]),
        },
        out,
    )


if __name__ == "__main__":
    typer.run(main)
