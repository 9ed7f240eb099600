"""Registered identities in single requests: found in the tenant's own output, under the person's consent."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from pipelines.identities import Identities, IdentityCard
from pipelines.serving.records import VideoRecord
from tests.pipelines.serving.conftest import SHAPE, Running
from tests.pipelines.serving.test_batches import put_manifest, row, wait


@pytest.fixture(scope="module")
def anna(stub: Running) -> IdentityCard:
    """An identity of the tenant "studio"; the stub has no weights that it could change."""
    return stub.learn("anna", {})


def test_video_with_a_registered_identity_names_it_in_every_record_and_in_its_remix(
    stub: Running, anna: IdentityCard, astronaut_png: bytes
) -> None:
    asked = {"seed": 500, "identity_lora": "anna", "consent_id": anna.consent_id}
    video = stub.wait(stub.create(astronaut_png, **asked)["id"])
    assert (video["status"], video["identity_lora"]) == ("completed", "anna")
    assert VideoRecord.from_record(stub.record(video["id"])).identity == anna
    assert stub.client.get(f"/v1/videos/{video['id']}/record").json()["identity_lora"] == asdict(anna)

    remix = stub.client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "she dances"}).json()
    assert stub.wait(remix["id"])["identity_lora"] == "anna"
    assert stub.client.get(f"/v1/videos/{remix['id']}/record").json()["identity_lora"] == asdict(anna)

    plain = stub.wait(stub.create(astronaut_png, seed=500)["id"])
    assert plain["identity_lora"] is None
    assert "identity_lora" not in stub.client.get(f"/v1/videos/{plain['id']}/record").json()

    # A row of a batch finds the same identity, and so the same video.
    name = put_manifest(stub, "anna.parquet", [row("with-anna", **asked)])
    batch = wait(stub, stub.client.post("/v1/batches", json={"manifest": name}).json()["id"])
    assert (batch["counts"]["ok"], stub.renders()["with-anna"]) == (1, 0)


def test_identity_of_another_tenant_is_answered_like_one_that_nobody_has(stub: Running, astronaut_png: bytes) -> None:
    theirs = stub.learn("theirs", {}, tenant="rival")
    answers = []
    with stub.client_of("asker") as asker:
        for name in ("theirs", "nobody"):
            fields = {"prompt": "p", **SHAPE, "identity_lora": name, "consent_id": theirs.consent_id}
            answer = asker.post("/v1/videos", data=fields, files={"photo": ("photo.png", astronaut_png)})
            assert answer.headers["content-type"] == "application/problem+json"
            assert (answer.status_code, answer.json()["code"]) == (422, "unknown_identity")
            answers.append(answer.text.replace(name, "NAME"))
    assert answers[0] == answers[1]
    assert "there are: none" in answers[0]
    # Nothing of a request that is refused is kept.
    assert not stub.tenant("asker").exists()


@pytest.mark.parametrize("consent_id", ["consent-other", None])
def test_identity_under_another_consent_than_its_own_is_refused(
    stub: Running, anna: IdentityCard, astronaut_png: bytes, consent_id: str | None
) -> None:
    fields = {"prompt": "p", **SHAPE, "identity_lora": "anna", **({"consent_id": consent_id} if consent_id else {})}
    answer = stub.client.post("/v1/videos", data=fields, files={"photo": ("photo.png", astronaut_png)})
    assert (answer.status_code, answer.json()["code"]) == (422, "identity_consent")


def test_identity_that_is_deleted_fails_what_waits_for_it_and_asking_again_is_the_same_video(
    stub: Running, astronaut_png: bytes
) -> None:
    card = stub.learn("ben", {})
    asked = {"identity_lora": "ben", "consent_id": card.consent_id, "headers": {"Idempotency-Key": "ben"}}
    with stub.occupied(astronaut_png):
        video_id = stub.create(astronaut_png, **asked)["id"]
        Identities(stub.config.tenant_root("studio")).delete("ben")
    failed = stub.wait(video_id)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "identity_changed")
    assert str(stub.store) not in failed["error"]["message"]
    assert stub.create(astronaut_png, **asked)["id"] == video_id
    answer = stub.client.post(f"/v1/videos/{video_id}/remix", json={"prompt": "p"})
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_identity")
