"""Batches over HTTP: manifests rendered behind single requests, on the same renderers, as runs like any other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from echovideo.request import RenderRequest
from pipelines.ledger import Ledger
from pipelines.manifest import write_manifest
from pipelines.storage import StoragePath
from tests.pipelines.serving.conftest import Running, wait_until

ENDED = ("completed", "cancelled", "failed")


def row(row_id: str, seed: int, **values: Any) -> RenderRequest:
    shape = {"height": 96, "width": 96, "num_frames": 17, "num_inference_steps": 10}
    return RenderRequest(**{"row_id": row_id, "prompt": "p", "photo_bytes": b"x", "seed": seed, **shape, **values})


def put_manifest(stub: Running, name: str, rows: list[RenderRequest]) -> str:
    path = stub.tenant() / "inputs" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    write_manifest(rows, StoragePath.parse(str(path)))
    return name


def view(stub: Running, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = stub.client.get(f"/v1/batches/{batch_id}").json()
    return batch


def wait(stub: Running, batch_id: str) -> dict[str, Any]:
    wait_until(lambda: view(stub, batch_id)["status"] in ENDED)
    return view(stub, batch_id)


def test_batch_ends_with_every_row_counted_and_its_report_to_be_read(stub: Running) -> None:
    rows = [row("a", 400), row("b", 401), row("bad", 402, tier="high"), row("raises", 403, tags={"raise": "render"})]
    name = put_manifest(stub, "four.parquet", rows)
    answer = stub.client.post("/v1/batches", json={"manifest": name})
    assert answer.status_code == 202, answer.text
    batch = wait(stub, answer.json()["id"])
    assert batch["status"] == "completed"
    assert batch["counts"] == {"ok": 2, "rejected": 1, "failed": 1, "dead": 0, "cancelled": 0}
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    assert (batch["manifest"], batch["model"]) == ("four.parquet", "stub")

    table = pq.read_table(io.BytesIO(stub.client.get(batch["results"]["table"]).content))
    assert sorted(table["row_id"].to_pylist()) == ["a", "b", "bad", "raises"]
    report = stub.client.get(batch["results"]["report"])
    assert "four.parquet" in report.text
    assert "default-src 'none'" in report.headers["content-security-policy"]
    assert stub.client.get(batch["results"]["contact_sheet"]).content[:4] == b"\x89PNG"

    # It is a run like any other: the command line's tools read it.
    ledger = Ledger(StoragePath.parse(str(stub.tenant())), batch["id"])
    assert ledger.counts() == batch["counts"]
    assert not ledger.is_driven()
    assert batch["id"] in [each["id"] for each in stub.client.get("/v1/batches").json()["data"]]
    # What has ended is not counted again, until a later driver such as the command line has been at it.
    ended = ledger.folder / "ended.json"
    ended.write_json({**ended.read_json(), "counts": {**batch["counts"], "ok": 9}})
    assert view(stub, batch["id"])["counts"]["ok"] == 9
    ledger.open_epoch().close()
    assert view(stub, batch["id"])["counts"] == batch["counts"]

    # The same manifest and settings are the same batch; only what failed is tried again.
    renders = stub.renders()
    again = stub.client.post("/v1/batches", json={"manifest": name}).json()
    assert again["id"] == batch["id"]
    assert wait(stub, again["id"])["counts"] == batch["counts"]
    assert stub.renders() == renders


def test_single_request_goes_before_the_rows_of_a_batch_and_cancelling_keeps_what_is_done(
    stub: Running, astronaut_png: bytes
) -> None:
    rows = [row(f"row-{i}", 420 + i, tags={"step_s": "0.1"}) for i in range(10)]
    name = put_manifest(stub, "ten.parquet", rows)
    batch_id = stub.client.post("/v1/batches", json={"manifest": name}).json()["id"]
    wait_until(lambda: len(stub.steps("row-0")) >= 1)
    video_id = stub.create(astronaut_png, seed=430)["id"]
    assert stub.wait(video_id)["status"] == "completed"
    done = view(stub, batch_id)["counts"]["ok"]
    # The two rows that had begun went on, and at most one more could begin beside it.
    assert done <= 4
    cancelling = stub.client.post(f"/v1/batches/{batch_id}/cancel").json()
    assert cancelling["status"] in ("cancelling", "cancelled", "finalizing")
    batch = wait(stub, batch_id)
    assert batch["status"] == "cancelled"
    assert batch["counts"]["ok"] + batch["counts"]["cancelled"] == 10
    assert batch["counts"]["cancelled"] >= 5
    before = stub.renders()

    stub.client.post("/v1/batches", json={"manifest": name})
    assert wait(stub, batch_id)["counts"]["ok"] == 10
    assert all(count == 1 for row_id, count in stub.renders().items() if row_id in before)

    assert stub.client.delete(f"/v1/batches/{batch_id}").json()["deleted"] is True
    assert stub.client.get(f"/v1/batches/{batch_id}").status_code == 404
    assert not (stub.tenant() / "runs" / batch_id).exists()


@pytest.mark.parametrize(
    ("manifest", "code"),
    [
        ("missing.parquet", "not_found"),
        ("/etc/passwd", "uri_not_allowed"),
        ("../../rival/inputs/m.parquet", "invalid_manifest"),
        ("s3://elsewhere/m.parquet", "uri_not_allowed"),
        ("text.parquet", "manifest"),
        ("https://elsewhere/m.parquet", "invalid_manifest"),
        ("folder", "not_found"),
    ],
)
def test_batch_of_what_is_no_manifest_of_the_tenants_is_refused(stub: Running, manifest: str, code: str) -> None:
    folder: Path = stub.tenant() / "inputs"
    (folder / "folder").mkdir(exist_ok=True, parents=True)
    (folder / "text.parquet").write_text("no Parquet")
    answer = stub.client.post("/v1/batches", json={"manifest": manifest})
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_batch_of_photos_that_belong_to_another_tenant_has_their_rows_refused(stub: Running) -> None:
    rival = stub.tenant("rival") / "inputs" / "secret.png"
    rival.parent.mkdir(exist_ok=True, parents=True)
    rival.write_bytes(b"x")
    rows = [row("theirs", 440, photo_bytes=None, photo_uri=str(rival)), row("ours", 441)]
    answer = stub.client.post("/v1/batches", json={"manifest": put_manifest(stub, "theirs.parquet", rows)})
    batch = wait(stub, answer.json()["id"])
    assert (batch["counts"]["ok"], batch["counts"]["rejected"]) == (1, 1)


def test_batches_of_another_tenant_are_not_there(stub: Running) -> None:
    name = put_manifest(stub, "one.parquet", [row("one", 450)])
    batch = wait(stub, stub.client.post("/v1/batches", json={"manifest": name}).json()["id"])
    with stub.client_of("rival") as rival:
        assert rival.get("/v1/batches").json()["data"] == []
        path = f"/v1/batches/{batch['id']}"
        answers = [
            rival.get(path),
            rival.post(f"{path}/cancel"),
            rival.delete(path),
            rival.get(batch["results"]["report"]),
        ]
        assert [answer.status_code for answer in answers] == [404] * 4
    assert stub.client.get("/v1/files/runs/on-demand/run.json").status_code == 404
    assert stub.client.get("/v1/files/../studio/videos").status_code == 404
