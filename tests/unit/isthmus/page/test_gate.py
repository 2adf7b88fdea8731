"""The gate lets in only those who know the token, name this machine, and ask from the page itself."""

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the page needs isthmus[page]")

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from isthmus.page.gate import MOST_BODY_BYTES, Gate
from isthmus.page.serve import BUILT, application, serve, token_in
from isthmus.proto.errors import Busy, InvalidInput

TOKEN = "a-token-of-the-tests"
HOME = f"http://127.0.0.1:8470/{TOKEN}"
SENT_BY_THE_PAGE = {"content-type": "application/json"}


@pytest.fixture
def page() -> TestClient:
    async def echo(request: Request) -> Response:
        content = json.loads(await request.body())
        if content == "busy":
            raise Busy("too much to do")
        if content == "wrong":
            raise InvalidInput("that is wrong")
        return JSONResponse({"heard": content})

    routes: list[Any] = [Route("/api/echo", echo, methods=["POST"])]
    return TestClient(Gate(application(routes, {"page": "test"}), TOKEN, 8470), base_url="http://127.0.0.1:8470")


def test_the_front_end_is_served_to_those_who_know_the_token(page: TestClient) -> None:
    assert "<main" in page.get(f"{HOME}/").text
    for path in BUILT.iterdir():
        if path.suffix == ".gz":
            whole = page.get(f"{HOME}/{path.stem}")
            assert (whole.headers["content-encoding"], whole.headers["content-type"]) == ("gzip", "application/wasm")
            assert whole.content == gzip.decompress(path.read_bytes())
        else:
            assert page.get(f"{HOME}/{path.name}").content == path.read_bytes()
    assert page.get(f"{HOME}/api/page").json() == {"page": "test"}
    for wrong in ("/", f"/{TOKEN}", f"/{TOKEN}x/", "/another/", "/page.js", f"//{TOKEN}/"):
        refused = page.get(f"http://127.0.0.1:8470{wrong}")
        assert refused.status_code == 403, wrong
        assert TOKEN not in refused.text


@pytest.mark.parametrize("name", ["..%2f..%2fserve.py", "%2e%2e/serve.py", "serve.py", ".hidden", "built/page.js"])
def test_nothing_else_is_served(page: TestClient, name: str) -> None:
    assert page.get(f"{HOME}/{name}").status_code == 404


def test_a_name_that_was_bound_to_this_machine_is_refused(page: TestClient) -> None:
    for host in ("evil.example:8470", "127.0.0.1", "127.0.0.1:8471", "localhost.evil.example:8470", ""):
        assert page.get(f"{HOME}/", headers={"host": host}).status_code == 421, host
    assert page.get(f"{HOME}/", headers={"host": "localhost:8470"}).status_code == 200


def test_every_answer_forbids_what_the_page_does_not_need(page: TestClient) -> None:
    for answer in (page.get(f"{HOME}/"), page.get("http://127.0.0.1:8470/"), page.get(f"{HOME}/none")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_only_the_student_in_the_browser_may_open_a_camera_and_its_worker_has_no_connection(page: TestClient) -> None:
    closed, opened = page.get(f"{HOME}/").headers, page.get(f"{HOME}/browser.html").headers
    assert closed["permissions-policy"].startswith("camera=(), microphone=()")
    assert opened["permissions-policy"].startswith("camera=(self), microphone=(self)")
    assert opened["content-security-policy"] == closed["content-security-policy"]
    worker = page.get(f"{HOME}/student.js").headers
    assert worker["content-security-policy"] == "default-src 'none'; script-src 'wasm-unsafe-eval'"
    assert worker["permissions-policy"] == closed["permissions-policy"]


def test_only_the_page_itself_changes_something(page: TestClient) -> None:
    def post(headers: dict[str, str], content: bytes = b'"hello"') -> int:
        return page.post(f"{HOME}/api/echo", content=content, headers=headers).status_code

    assert post(SENT_BY_THE_PAGE) == 200
    assert post({**SENT_BY_THE_PAGE, "origin": "http://127.0.0.1:8470", "sec-fetch-site": "same-origin"}) == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        assert post({**SENT_BY_THE_PAGE, "origin": origin}) == 403
    assert post({**SENT_BY_THE_PAGE, "sec-fetch-site": "cross-site"}) == 403
    assert post({"content-type": "text/plain"}) == 415
    assert post(SENT_BY_THE_PAGE, b'"' + b"a" * MOST_BODY_BYTES + b'"') == 413
    assert page.request("DELETE", f"{HOME}/api/echo", headers=SENT_BY_THE_PAGE).status_code == 405


def test_errors_of_ours_are_words_for_a_person(page: TestClient) -> None:
    wrong = page.post(f"{HOME}/api/echo", json="wrong")
    assert (wrong.status_code, wrong.json()) == (409, {"error": "that is wrong"})
    assert page.post(f"{HOME}/api/echo", json="busy").status_code == 503


def test_the_token_stays_the_same_and_is_its_owners_alone(tmp_path: Path) -> None:
    token = token_in(tmp_path)
    assert len(token) >= 32
    assert token_in(tmp_path) == token
    path = tmp_path / "page-token"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("short")
    assert token_in(tmp_path) != "short"


def test_a_port_that_cannot_be_had_names_the_way_out() -> None:
    """A page that is started twice: the second one says so, and the first goes on."""
    with socket.create_server(("127.0.0.1", 0)) as first, pytest.raises(InvalidInput) as refused:
        serve(application([], {}), TOKEN, first.getsockname()[1], pytest.fail)
    assert "Address already in use" in str(refused.value) and "--port" in str(refused.value)
