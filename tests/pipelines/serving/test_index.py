"""The index by itself: order, pages, whose turn it is, and how long things take."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from echovideo.request import RenderRequest
from pipelines.identities import IdentityCard
from pipelines.serving.index import BATCH, INTERACTIVE, Entries, Entry, Estimates, Queue
from pipelines.serving.records import Job, VideoRecord


def request(name: str = "a", **values: object) -> RenderRequest:
    return RenderRequest(**{"row_id": name, "prompt": "p", "photo_uri": "u", **values})


def entry(name: str, created_at: float) -> Entry:
    return Entry(
        VideoRecord(tenant="t", key_id="k", created_at=created_at, request=request(name), photo_sha256="0", nonce="n")
    )


def job(name: str) -> Job:
    return Job(tenant="t", run_id="r", epoch=0, request=request(name))


def test_record_after_json_is_the_same() -> None:
    record = entry("a", 1.5).record
    card = IdentityCard(
        name="n", file="f", sha256="0", model="m", base_digest="1", licence="l", consent_id="c", made={"run": "2"}
    )
    for each in (record, replace(record, identity=card)):
        assert VideoRecord.from_record(json.loads(json.dumps(each.to_record()))) == each


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_entries_added_and_removed_in_any_order_hold_each_once(order: str) -> None:
    entries, shuffled = Entries(), random.Random(0)
    names = [f"v{i}" for i in range(50)]
    for name in shuffled.sample(names, 50):
        entries.add(entry(name, int(name[1:]) // 3))
    for name in names[::7]:
        assert entries.remove(name) is not None
    expected = [name for name in names if name not in names[::7]]
    expected.sort(key=lambda name: (int(name[1:]) // 3, name), reverse=order == "desc")
    seen: list[str] = []
    more = True
    while more:
        page, more = entries.page(limit=4, after=seen[-1] if seen else None, order=order)
        seen += [each.record.video_id for each in page]
    assert seen == expected
    assert entries.remove("v0") is None
    with pytest.raises(KeyError):
        entries.page(limit=1, after="v0", order=order)


def test_queue_takes_single_requests_first_and_what_goes_back_keeps_its_place() -> None:
    queue = Queue()
    for name, priority in (("row-1", BATCH), ("one", INTERACTIVE), ("row-2", BATCH), ("two", INTERACTIVE)):
        queue.append(job(name), priority)
    assert queue.num_interactive() == 2
    assert [queue.position(job(name).name) for name in ("one", "two", "row-1", "row-2", "no")] == [0, 1, 2, 3, None]
    first, place = queue.pop()
    assert first.request.row_id == "one"
    queue.put(first, place)
    assert queue.remove(job("two").name) == job("two")
    assert queue.remove(job("two").name) is None
    assert [queue.pop()[0].request.row_id for _ in range(3)] == ["one", "row-1", "row-2"]
    assert len(queue) == 0


def test_estimate_is_of_the_same_shape_or_else_by_size() -> None:
    estimates = Estimates()
    shape = {"height": 160, "width": 160, "num_frames": 9, "num_inference_steps": 10}
    assert estimates.render_s(request(**shape)) is None
    for seconds in (1.0, 2.0, 30.0):
        estimates.add(request(**shape), seconds)
    assert estimates.render_s(request(**shape)) == 2.0
    assert estimates.render_s(request(**{**shape, "num_inference_steps": 20})) == 4.0
    assert estimates.mean_s() == 11.0
