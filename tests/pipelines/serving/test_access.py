"""Who may do what: keys, scopes, limits, sign-in links and sessions, against a real Serve."""

from __future__ import annotations

import httpx
import pytest

from echovideo.errors import RequestError
from pipelines.serving.access import Access
from pipelines.storage import StoragePath
from tests.pipelines.serving.conftest import SHAPE, Running, wait_until


def test_key_is_stored_as_a_digest_only(root: StoragePath) -> None:
    access = Access(root)
    key, text = access.create_key("studio", ["render", "read"])
    secret = text.split("_", 2)[2]
    assert all(secret.encode() not in (root / file.path).read_bytes() for file in root.list_files())
    assert access.key_of_text(text) == key
    assert key.scopes == ("read", "render")
    assert access.list_keys() == [key]
    for other in (text[:-1], text + "x", "", "ev_", f"ev_{key.key_id}_", "ev_../../x_y", f"ev_{'0' * 300}_x"):
        assert access.key_of_text(other) is None
    access.revoke_key(key.key_id)
    assert access.key_of_text(text) is None
    with pytest.raises(RequestError, match="no key"):
        access.revoke_key(key.key_id)


@pytest.mark.parametrize(
    ("tenant", "scopes"), [("../x", ["read"]), ("Studio", ["read"]), ("", ["read"]), ("a", ["all"])]
)
def test_key_of_a_bad_tenant_or_scope_is_refused(root: StoragePath, tenant: str, scopes: list[str]) -> None:
    with pytest.raises(RequestError):
        Access(root).create_key(tenant, scopes)


def test_link_signs_in_once_and_its_session_ends_with_its_key(root: StoragePath) -> None:
    access = Access(root)
    key, _ = access.create_key("studio", ["read"])
    token, expires_at = access.create_link(key.key_id)
    signed_in = access.sign_in(token)
    assert signed_in is not None
    assert access.sign_in(token) is None
    assert access.sign_in("other") is None
    cookie, session = signed_in
    caller = access.caller_of_session(cookie)
    assert caller is not None
    assert (caller.key, caller.session) == (key, session)
    access.sweep(expires_at + 1)
    assert (access.folder / "links").list_names() == []
    assert access.caller_of_session(cookie) == caller
    access.revoke_key(key.key_id)
    assert access.caller_of_session(cookie) is None
    access.sweep(session.expires_at + 1)
    assert (access.folder / "sessions").list_names() == []


def test_call_without_a_valid_key_is_answered_401_before_its_body_is_looked_at(stub: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer ev_0_0"}, {"Cookie": "echovideo_session=x"}):
        answer = httpx.post(f"{stub.url}/v1/videos", content=b"{", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert (answer.headers["www-authenticate"], answer.headers["retry-after"]) == ("Bearer", "5")


def test_key_without_the_scope_is_answered_403(stub: Running, astronaut_png: bytes) -> None:
    with stub.client_of("studio", "read") as reader, stub.client_of("studio", "render") as maker:
        asked = {"data": {"prompt": "p", **SHAPE}, "files": {"photo": ("p.png", astronaut_png)}}
        refused = reader.post("/v1/videos", **asked)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert refused.headers["retry-after"] == "5"
        assert reader.get("/v1/videos").status_code == 200
        assert maker.get("/v1/videos").status_code == 403
        assert reader.get("/metrics").status_code == 403
        assert maker.delete("/v1/videos", params={"before": 0}).status_code == 403


def test_key_over_its_rate_is_answered_429_with_the_time_to_wait(stub: Running, astronaut_png: bytes) -> None:
    with stub.client_of("rate", requests_per_minute=2) as client:
        videos = [stub.create(astronaut_png, client, seed=200 + i) for i in range(2)]
        answer = client.post("/v1/videos", data={"prompt": "p", **SHAPE}, files={"photo": ("p.png", astronaut_png)})
        assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        # Looking at what there is costs nothing.
        assert {client.get(f"/v1/videos/{video['id']}").status_code for video in videos} == {200}


def test_key_with_its_limit_of_videos_at_work_is_answered_429_until_one_has_ended(
    stub: Running, astronaut_png: bytes
) -> None:
    with stub.client_of("active", max_active=1, requests_per_minute=1000) as client:
        asked = {"data": {"prompt": "p", **SHAPE, "seed": 210}, "files": {"photo": ("p.png", astronaut_png)}}
        video = stub.create(astronaut_png, client, seed=210, headers={"Idempotency-Key": "a"})
        answer = client.post("/v1/videos", **asked)
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_active")
        # A repeated request is no further one.
        assert stub.create(astronaut_png, client, seed=210, headers={"Idempotency-Key": "a"})["id"] == video["id"]
        wait_until(lambda: client.get(f"/v1/videos/{video['id']}").json()["status"] == "completed")
        assert client.post("/v1/videos", **asked).status_code == 202


def test_sign_in_link_becomes_a_cookie_that_changes_nothing_without_its_token(
    stub: Running, astronaut_png: bytes
) -> None:
    link = stub.client.post("/v1/sign-in-links").json()
    with httpx.Client(base_url=stub.url) as browser:
        page = browser.get(link["path"])
        assert 'action="sign-in"' in page.text
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        token = link["path"].partition("=")[2]
        foreign = browser.post("/sign-in", data={"token": token}, headers={"Sec-Fetch-Site": "cross-site"})
        assert (foreign.status_code, "set-cookie" in foreign.headers) == (401, False)
        answer = browser.post("/sign-in", data={"token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "./")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert browser.post("/sign-in", data={"token": token}).status_code == 401

        session = browser.get("/v1/session").json()
        assert session["tenant"] == "studio"
        asked = {"data": {"prompt": "p", **SHAPE, "seed": 220}, "files": {"photo": ("p.png", astronaut_png)}}
        for headers in ({}, {"X-CSRF-Token": "x"}):
            refused = browser.post("/v1/videos", **asked, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (403, "csrf")
            assert refused.headers["retry-after"] == "5"
        csrf = {"X-CSRF-Token": session["csrf_token"]}
        assert browser.post("/v1/videos", **asked, headers=csrf).status_code == 202
        assert browser.get("/v1/videos").status_code == 200
        assert browser.delete("/v1/session", headers=csrf).status_code == 204
        assert browser.get("/v1/videos").status_code == 401


def test_answers_carry_the_headers_of_a_private_page(stub: Running) -> None:
    headers = stub.client.get("/v1/videos").headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
