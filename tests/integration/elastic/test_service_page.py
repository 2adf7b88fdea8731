"""The serving side's page in a browser, of a real service under the load of ``isthmus cloud load``.

Screenshots are written to the folder that ISTHMUS_SCREENSHOTS names, else to the test's own.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("starlette", reason="the page needs isthmus[generate]")

from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.edge.household import chromium, ended, started
from tests.rigs.elastic.server import ElasticRig, Made, pixels, png
from tests.rigs.project.ports import free_port
from tests.rigs.project.system import missing

PATIENCE_MS = 120_000
TASKS = ("animals", "vehicles")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def address_of(process: Any, log: Path) -> str:
    """Return the last word of the first line that a command says."""
    line = process.stdout.readline()
    assert line, log.read_text()
    return str(line.split()[-1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """The service's address, its page's address, and a folder."""
    folder = tmp_path_factory.mktemp("service")
    ElasticRig(folder)
    metrics = free_port()
    run = ["cloud", "serve", "--state", folder / "state", "--elastic-model", folder / "vit.safetensors"]
    run += ["--elastic-pixels", "cifar10", "--elastic-profile", folder / "profile.json", "--metrics-port", metrics]
    (folder / "picture.png").write_bytes(png(pixels(0)))
    with ExitStack() as stack:
        service = started(run, folder / "service.log")
        stack.callback(ended, service)
        address = address_of(service, folder / "service.log")
        with grpc.insecure_channel(address) as channel:
            for seed, name in enumerate(TASKS):
                pb_grpc.ElasticServiceStub(channel).RegisterTask(Made.random(name, 4, seed=seed).messages())
        page = started(["cloud", "page", "--metrics-port", metrics, "--port", 0], folder / "page.log")
        stack.callback(ended, page)
        yield address, address_of(page, folder / "page.log"), folder


def load(address: str, folder: Path, task: str, rate: int) -> dict[str, Any]:
    """Send queries for some seconds; return what became of them."""
    words = ["cloud", "load", "--server", address, "--task", task, "--image", folder / "picture.png"]
    words += ["--rate", rate, "--duration-s", 6, "--connections", 2, "--out", folder / f"{task}.json"]
    loading = started(words, folder / "load.log")
    loading.communicate(timeout=300)
    assert loading.returncode == 0, (folder / "load.log").read_text()
    (row,) = json.loads((folder / f"{task}.json").read_text())["rows"]
    return dict(row)


def test_the_page_shows_what_the_load_did(served: tuple[str, str, Path]) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ModuleNotFoundError:
        missing("the check of accessibility needs the package axe-playwright-python")
    address, page_address, folder = served
    pictures = Path(os.environ.get("ISTHMUS_SCREENSHOTS") or folder / "screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        trouble: list[str] = []
        pages = {width: browser.new_page(viewport={"width": width, "height": 900}) for width in (1280, 360)}
        for page in pages.values():
            page.set_default_timeout(PATIENCE_MS)
            page.on("console", lambda said: said.type == "error" and trouble.append(said.text))
            page.goto(page_address)
            page.locator("section[aria-label=Utility]", has_text="No image has ended").wait_for()
        sent = {task: load(address, folder, task, rate)["sent"] for task, rate in (("animals", 40), ("vehicles", 20))}
        for width, page in pages.items():
            for task, count in sent.items():
                row = page.locator("section", has_text="What became of the images").locator("tr", has_text=task)
                row.filter(has_text=str(count)).wait_for()
            utility = page.locator("section[aria-label=Utility]")
            utility.filter(has_text="% of the bound").wait_for()
            words = utility.locator("svg").get_attribute("aria-label")  # utility earned N, bound N
            earned, bound = (part.split()[-1] for part in words.split(","))
            assert 0 < float(earned) <= float(bound)
            # Every query has utility 1, and at most 0.9 is right at any gamma.
            assert float(bound) == pytest.approx(0.9 * sum(sent.values()), abs=0.1)
            page.locator("section[aria-label=Gamma]", has_text="images on average").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(page).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], width
            page.screenshot(path=str(pictures / f"service-{width}.png"), full_page=width == 1280)
        assert not trouble
