"""Web pages as clients: CORS, and names that somebody else made point here."""

import httpx
import pytest


def preflight(server, origin: str, **headers) -> httpx.Response:
    asked = {"access-control-request-method": "POST", "origin": origin, **headers}
    asked["access-control-request-headers"] = "authorization,content-type"
    return httpx.options(f"{server.url}/v1/chat/completions", headers=asked)


def may_read(server, origin: str) -> bool:
    """Whether a browser would let a page of this origin ask and read."""
    answers = (
        preflight(server, origin),
        httpx.get(f"{server.url}/v1/models", headers={"origin": origin}),
    )
    allowed = {
        answer.headers.get("access-control-allow-origin") in (origin, "*") for answer in answers
    }
    assert len(allowed) == 1 and answers[0].is_success == allowed.copy().pop()
    return allowed.pop()


@pytest.mark.parametrize(
    ("settings", "yes", "no"),
    [
        (
            {},
            ["http://localhost:3000", "http://127.0.0.1:8080", "https://app.localhost", "http://[::1]:1"],
            ["https://evil.example", "http://localhost.evil.example", "null", "http://127.0.0.1.evil.example"],
        ),
        (dict(allow_origins=["https://chat.example"]), ["https://chat.example"], ["http://localhost:3000"]),
        (dict(allow_origins=["*"]), ["https://anything.example"], []),
        (dict(allow_origins=["none"]), [], ["http://localhost:3000"]),
    ],
)  # fmt: skip
def test_pages_of_allowed_origins_only(serve, settings, yes, no):
    server = serve(**settings)
    assert all(may_read(server, origin) for origin in yes)
    assert not any(may_read(server, origin) for origin in no)


def test_other_pages_cannot_post(server):
    """A browser would keep the reply from such a page, but the request would be processed."""
    url, body = f"{server.url}/v1/completions", b'{"prompt": "a", "max_tokens": 1}'
    headers = {"content-type": "application/json"}

    def status(origin: str, **more) -> int:
        return httpx.post(
            url, content=body, headers=headers | more | {"origin": origin}
        ).status_code

    assert status("http://localhost:3000") == status("http://minimind", host="minimind") == 200
    assert status("https://evil.example") == status("null") == 403
    plain = {"content-type": "text/plain"}  # which needs no preflight
    assert httpx.post(url, content=body, headers=plain).status_code == 400


def test_an_api_key_does_not_stop_the_preflight(serve):
    assert preflight(serve(api_key="secret"), "http://localhost:3000").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("192.168.1.7", 200),
        ("[::1]:8000", 200),
        ("minimind", 200),  # of a compose file
        ("host.docker.internal:8000", 200),
        ("evil.example:8000", 403),  # a page whose name was made to point to 127.0.0.1
        ("127.0.0.1.evil.example", 403),
        ("gpu.lab.example", 403),
    ],
)
def test_the_host_is_a_name_of_this_server(server, host, status):
    response = httpx.get(f"{server.url}/v1/models", headers={"host": host})
    assert response.status_code == status


def test_further_names(serve):
    server = serve(allow_hosts=["gpu.lab.example"])
    for host, status in (("gpu.lab.example:80", 200), ("other.example", 403)):
        assert httpx.get(f"{server.url}/health", headers={"host": host}).status_code == status
