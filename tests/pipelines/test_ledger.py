from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from echovideo.errors import RunError, StorageError
from echovideo.video import Video
from pipelines.ledger import MAX_STRIKES, Claim, Epoch, Ledger, StaleDriverError, StoredVideo, next_strikes, run_id_for
from pipelines.outcome import Cancelled, Dead, Failed, Ok, Rejected, RowOutcome
from pipelines.storage import StoragePath

KEY = "ab" * 32
OTHER_KEY = "cd" * 32


def every_node_alive(node: str) -> bool:
    return True


def ok(row_id: str, stored: StoredVideo, attempt: int = 1) -> Ok:
    return Ok(
        row_id=row_id,
        attempt=attempt,
        video=Video(
            uri=stored.uri,
            sha256=stored.sidecar["sha256"],
            num_bytes=stored.sidecar["num_bytes"],
            width=16,
            height=16,
            num_frames=9,
            fps=16,
        ),
        sidecar_uri=stored.sidecar_uri,
        seed=1,
        seeds_tried=(1,),
        face_similarity=None,
        detection_rate=None,
    )


def must_claim(ledger: Ledger, row_id: str, epoch: Epoch, node: str = "node-1", stage: str = "render") -> Claim:
    claim = ledger.claim(row_id, epoch.number, stage, node, every_node_alive)
    assert isinstance(claim, Claim)
    return claim


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Run ids


def test_run_id_depends_on_values_and_not_on_order() -> None:
    run_id = run_id_for("d", {"tier": "exact", "steps": 50})
    canonical = b'{"manifest": "d", "settings": {"steps": 50, "tier": "exact"}}'
    assert run_id == hashlib.sha256(canonical).hexdigest()[:16]
    assert run_id == run_id_for("d", {"steps": 50, "tier": "exact"})
    assert len({run_id, run_id_for("d", {"steps": 51, "tier": "exact"}), run_id_for("e", {})}) == 3


# Strikes


@pytest.mark.parametrize("same_epoch", [True, False])
@pytest.mark.parametrize("same_stage", [True, False])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("node_alive", [True, False])
def test_strikes_count_only_when_driver_and_node_outlived_the_same_stage(
    same_epoch: bool, same_stage: bool, ended: bool, node_alive: bool
) -> None:
    previous = Claim(row_id="a", attempt=1, epoch=3, stage="render", node="n", strikes=1, token="t")
    strikes = next_strikes(
        previous,
        epoch=3 if same_epoch else 4,
        stage="render" if same_stage else "condition",
        ended=ended,
        node_alive=node_alive,
    )
    only_the_row_is_left = (same_epoch, same_stage, ended, node_alive) == (True, True, False, True)
    assert strikes == (2 if only_the_row_is_left else 1)


def test_claims_of_a_row_that_kills_its_worker_reach_the_limit_and_dead_is_final(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    with ledger.open_epoch() as epoch:
        claims = [must_claim(ledger, "a", epoch) for _ in range(MAX_STRIKES + 1)]
        assert [claim.strikes for claim in claims] == [0, 1, 2, 3]
        assert [claim.attempt for claim in claims] == [1, 2, 3, 4]
        dead = Dead(row_id="a", strikes=claims[-1].strikes, message="took its worker down 3 times")
        assert ledger.commit(dead, claims[-1].epoch) == dead
        assert ledger.claim("a", epoch.number, "render", "node-1", every_node_alive) == dead
    assert ledger.outcomes() == {"a": dead}


def test_claims_lost_with_their_node_or_driver_do_not_count(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    with ledger.open_epoch() as epoch:
        must_claim(ledger, "a", epoch, node="lost")
        claim = ledger.claim("a", epoch.number, "render", "node-2", lambda node: node != "lost")
        assert isinstance(claim, Claim)
        assert claim.strikes == 0
        ledger.commit(Failed(row_id="a", attempt=2, stage="render", code="oom", message="m"), epoch.number)
        assert must_claim(ledger, "a", epoch).strikes == 0
    with ledger.open_epoch() as epoch:
        assert must_claim(ledger, "a", epoch).strikes == 0
        assert must_claim(ledger, "a", epoch).strikes == 1


# Races


def test_claim_race_of_threads_has_one_winner_a_row(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    start = threading.Barrier(3)

    def claim(row_and_node: tuple[str, str]) -> Claim | RowOutcome | None:
        start.wait()
        return ledger.claim(row_and_node[0], 1, "render", row_and_node[1], every_node_alive)

    with ledger.open_epoch(), ThreadPoolExecutor(3) as pool:
        for row in range(4):
            claims = [c for c in pool.map(claim, [(f"r{row}", f"n{n}") for n in range(3)]) if isinstance(c, Claim)]
            # A late caller sees the first claim and makes the next attempt: never the same attempt twice.
            assert sorted(c.attempt for c in claims) == list(range(1, len(claims) + 1))
            first = json.loads((ledger.folder / "claims" / f"r{row}" / "1.json").read_bytes())
            assert [c.token for c in claims if c.attempt == 1] == [first["token"]]


def test_commit_race_of_processes_has_one_standing_outcome_a_row(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    code = (
        "import os, pickle, sys\n"
        "from pipelines.outcome import Dead\n"
        "ledger = pickle.load(sys.stdin.buffer)\n"
        "for row in range(8):\n"
        "    mine = Dead(row_id=f'r{row}', strikes=3, message=str(os.getpid()))\n"
        "    print(ledger.commit(mine, 1).message)"
    )
    with ledger.open_epoch():
        children = [
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for child in children:
            assert child.stdin is not None
            child.stdin.write(pickle.dumps(ledger))
            child.stdin.close()
        stood = [child.stdout.read().split() for child in children if child.stdout is not None]
        assert [child.wait() for child in children] == [0, 0]
    # Both processes report the same record for each row, and it is the one in the ledger.
    assert stood[0] == stood[1]
    outcomes = ledger.outcomes()
    for row in range(8):
        dead = outcomes[f"r{row}"]
        assert isinstance(dead, Dead)
        assert dead.message == stood[0][row].decode()
    assert {int(pid) for pid in stood[0]} <= {child.pid for child in children}


def test_open_epoch_race_of_threads_has_one_driver(root: StoragePath) -> None:
    start = threading.Barrier(3)
    held: list[Epoch] = []

    def drive(_: int) -> str:
        start.wait()
        try:
            held.append(Ledger(root, "run").open_epoch())
        except RunError as error:
            return error.code
        return "driver"

    with ThreadPoolExecutor(3) as pool:
        results = sorted(pool.map(drive, range(3)))
    for epoch in held:
        epoch.close()
    assert results == ["already_running", "already_running", "driver"]


# Drivers


def test_open_epoch_while_a_driver_lives_names_host_process_and_age(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    with ledger.open_epoch(host="studio-7") as epoch:
        assert epoch.number == 1
        with pytest.raises(RunError, match=rf"host studio-7, process {os.getpid()}, last heard of \d+ s ago") as caught:
            ledger.open_epoch()
        assert caught.value.code == "already_running"
        assert caught.value.numbers["age_s"] < ledger.lease_s
    with ledger.open_epoch() as epoch:
        assert epoch.number == 2


def test_open_epoch_after_a_kill_on_this_machine_takes_over_at_once(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    code = (
        "import pickle, sys, time\n"
        "ledger = pickle.load(sys.stdin.buffer)\n"
        "epoch = ledger.open_epoch()\n"
        "claim = ledger.claim('a', epoch.number, 'render', 'node-1', lambda node: True)\n"
        "print(claim.attempt, flush=True)\n"
        "time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(pickle.dumps(ledger))
    child.stdin.close()
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(RunError, match=f"process {child.pid}"):
        ledger.open_epoch()
    child.send_signal(signal.SIGKILL)
    # Not reaped yet: a zombie is dead too.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with ledger.open_epoch() as epoch:
        assert epoch.number == 2
        claim = must_claim(ledger, "a", epoch)
        assert (claim.attempt, claim.strikes) == (2, 0)
    child.wait()


def test_open_epoch_of_a_reused_pid_is_not_taken_for_the_old_driver(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    ledger.open_epoch()._closing.set()
    record = (ledger.folder / "epochs" / "1.json").read_json()
    (ledger.folder / "epochs" / "1.json").write_json({**record, "process_start": record["process_start"] - 1})
    with ledger.open_epoch() as epoch:
        assert epoch.number == 2


def test_open_epoch_of_a_silent_driver_elsewhere_waits_for_the_lease(root: StoragePath) -> None:
    first = Ledger(root, "run").open_epoch()
    path = root / "runs" / "run" / "epochs" / "1.json"
    path.write_json({**path.read_json(), "machine": "another machine", "pid": 1})
    with pytest.raises(RunError, match="process 1,"):
        Ledger(root, "run").open_epoch()
    # Seen with a lease that is over by now, the same silence is a dead driver.
    with Ledger(root, "run", lease_s=-1.0).open_epoch() as second:
        assert second.number == 2
    first.close()


def test_heartbeat_is_renewed_while_the_driver_lives(tmp_path: Path) -> None:
    ledger = Ledger(StoragePath.parse(str(tmp_path)), "run", heartbeat_s=0.01)
    heartbeat = tmp_path / "runs/run/epochs/1.heartbeat"
    with ledger.open_epoch():
        while not heartbeat.exists():
            pass
        first = heartbeat.stat().st_mtime_ns
        while heartbeat.stat().st_mtime_ns == first:
            pass
    assert (tmp_path / "runs/run/epochs/1.finished").exists()


def test_stale_driver_can_neither_claim_nor_commit(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    old = ledger.open_epoch()
    claim = must_claim(ledger, "a", old)
    path = ledger.folder / "epochs" / "1.json"
    path.write_json({**path.read_json(), "machine": "another machine"})
    with Ledger(root, "run", lease_s=-1.0).open_epoch() as new:
        rejected = Rejected(row_id="a", code="no_face", message="m")
        late: tuple[RowOutcome, ...] = (rejected, Failed(row_id="a", attempt=1, stage="s", code="c", message="m"))
        for outcome in late:
            with pytest.raises(StaleDriverError) as caught:
                ledger.commit(outcome, claim.epoch)
            assert caught.value.code == "stale_driver"
        with pytest.raises(StaleDriverError):
            ledger.claim("b", old.number, "render", "node-1", every_node_alive)
        assert ledger.outcomes() == {}
        assert ledger.commit(rejected, new.number) == rejected
    old.close()
    assert ledger.outcomes() == {"a": rejected}


# Outcomes


def test_outcomes_are_the_final_one_or_else_the_latest_attempt(root: StoragePath, tmp_path: Path) -> None:
    ledger = Ledger(root, "run")

    def failed(row_id: str, attempt: int) -> Failed:
        return Failed(row_id=row_id, attempt=attempt, stage="render", code="oom", message="m")

    with ledger.open_epoch() as epoch:
        stored = ledger.put_video(KEY, write_file(tmp_path / "v.mp4", b"video"), {})
        records: list[RowOutcome] = [
            failed("again", 1),
            failed("again", 2),
            failed("again", 10),
            failed("later-ok", 1),
            ok("later-ok", stored, attempt=2),
            Rejected(row_id="bad", code="no_face", message="m"),
            Cancelled(row_id="stopped", attempt=0),
        ]
        for record in records:
            assert ledger.commit(record, epoch.number) == record
    expected = {"again": records[2], "later-ok": records[4], "bad": records[5], "stopped": records[6]}
    assert ledger.outcomes() == expected
    assert pickle.loads(pickle.dumps(ledger)).outcomes() == expected
    assert ledger.counts() == {"ok": 1, "rejected": 1, "failed": 1, "dead": 0, "cancelled": 1}
    assert ledger.remaining(["new", "later-ok", "again", "bad", "stopped"]) == ["new", "again", "stopped"]


def test_commit_of_a_second_final_outcome_returns_the_first(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    first = Rejected(row_id="a", code="no_face", message="m")
    with ledger.open_epoch() as epoch:
        ledger.commit(first, epoch.number)
        assert ledger.commit(Dead(row_id="a", strikes=3, message="m"), epoch.number) == first
    assert ledger.outcomes() == {"a": first}


def test_outcomes_of_2000_rows_are_complete_and_read_once(tmp_path: Path) -> None:
    ledger = Ledger(StoragePath.parse(str(tmp_path)), "run")
    folder = tmp_path / "runs/run/outcomes"
    folder.mkdir(parents=True)
    for row in range(2000):
        (folder / f"r{row}.json").write_text(f'{{"outcome": "dead", "row_id": "r{row}", "strikes": 3, "message": ""}}')
    assert ledger.counts()["dead"] == 2000
    for row in range(2000):
        (folder / f"r{row}.json").write_text("would not read")
    assert ledger.outcomes()["r1999"] == Dead(row_id="r1999", strikes=3, message="")


def test_cancel_is_seen_until_withdrawn(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    assert not ledger.cancel_requested()
    Ledger(root, "run").request_cancel()
    assert ledger.cancel_requested()
    ledger.withdraw_cancel()
    assert not ledger.cancel_requested()


def test_config_written_again_is_the_newer_one(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    ledger.write_config({"num_renderers": 1})
    ledger.write_config({"num_renderers": 2})
    assert ledger.read_config() == {"num_renderers": 2}


def test_ledger_is_driven_while_an_epoch_is_open(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    assert (ledger.is_driven(), ledger.is_open()) == (False, False)
    with ledger.open_epoch():
        assert (ledger.is_driven(), ledger.is_open()) == (True, True)
    assert (ledger.is_driven(), ledger.is_open()) == (False, False)


def test_ledger_of_a_killed_driver_is_open_and_not_driven(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as driver:
        ledger.open_epoch(pid=driver.pid)
        driver.kill()
    assert (ledger.is_driven(), ledger.is_open()) == (False, True)


# Videos


def test_put_video_is_found_by_every_run_of_the_namespace(root: StoragePath, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    ledger = Ledger(root, "one")
    assert ledger.find_video(KEY) is None
    stored = ledger.put_video(KEY, write_file(tmp_path / "v.mp4", data), {"seed": 7})
    digest = hashlib.sha256(data).hexdigest()
    assert stored.uri == f"{root}/videos/ab/{KEY}-{digest[:16]}.mp4"
    assert stored.sidecar_uri == f"{root}/videos/ab/{KEY}.json"
    assert stored.sidecar["seed"] == 7
    assert stored.sidecar["sha256"] == digest
    assert stored.sidecar["num_bytes"] == len(data)
    assert Ledger(root, "two").find_video(KEY) == stored
    assert StoragePath.parse(stored.uri, root.options).read_bytes() == data


def test_put_video_of_other_bytes_under_the_same_key_keeps_the_first_and_no_orphan(
    root: StoragePath, tmp_path: Path
) -> None:
    first = Ledger(root, "one").put_video(KEY, write_file(tmp_path / "a.mp4", b"first"), {"seed": 1})
    second = Ledger(root, "two").put_video(KEY, write_file(tmp_path / "b.mp4", b"second"), {"seed": 1})
    assert second == first
    assert [file.path for file in (root / "videos").list_files()] == [first.uri.rsplit("/videos/")[1], f"ab/{KEY}.json"]


def test_video_without_its_sidecar_is_not_found(root: StoragePath, tmp_path: Path) -> None:
    ledger = Ledger(root, "run")
    stored = ledger.put_video(KEY, write_file(tmp_path / "a.mp4", b"first"), {})
    StoragePath.parse(stored.sidecar_uri, root.options).delete()
    assert ledger.find_video(KEY) is None
    assert ledger.put_video(KEY, tmp_path / "a.mp4", {}) == stored


def test_delete_run_keeps_videos_that_another_run_refers_to(root: StoragePath, tmp_path: Path) -> None:
    one, two = Ledger(root, "one"), Ledger(root, "two")
    shared = one.put_video(KEY, write_file(tmp_path / "a.mp4", b"shared"), {})
    one.put_video(OTHER_KEY, write_file(tmp_path / "b.mp4", b"own"), {})
    with two.open_epoch() as epoch:
        assert two.find_video(KEY) == shared
        two.commit(ok("a", shared), epoch.number)
    one.delete_run()
    assert (root / "runs" / "one").list_files() == []
    assert [file.path for file in (root / "videos").list_files()] == sorted(
        [f"ab/{KEY}.json", shared.uri.rsplit("/videos/")[1]]
    )
    assert two.find_video(KEY) == shared
    two.delete_run()
    assert root.list_files() == []


def test_delete_run_stopped_half_way_can_be_finished_and_shared_videos_go_with_the_last(
    root: StoragePath, tmp_path: Path
) -> None:
    one, two = Ledger(root, "one"), Ledger(root, "two")
    one.put_video(KEY, write_file(tmp_path / "a.mp4", b"shared"), {})
    two.find_video(KEY)
    (two.folder / "deleting").write_bytes(b"")
    with pytest.raises(RunError, match="is being deleted") as caught:
        two.open_epoch()
    assert caught.value.code == "being_deleted"
    one.delete_run()
    assert (root / "videos").list_files() == []
    two.delete_run()
    assert root.list_files() == []


def test_delete_run_cut_off_is_still_a_run_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(StoragePath.parse(str(tmp_path)), "one")
    ledger.write_config({})
    (ledger.folder / "faces" / "a.jpg").write_bytes(b"face")

    def cut_off(folder: str) -> None:
        # What a folder holds is deleted in any order.
        (Path(folder) / "run.json").unlink(missing_ok=True)
        raise OSError("cut off")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut_off)
        with pytest.raises(StorageError, match="cut off"):
            ledger.delete_run()
    assert ledger.read_config() == {}
    ledger.delete_run()
    assert list((tmp_path / "runs").iterdir()) == []


def test_delete_run_with_a_living_driver_is_refused(root: StoragePath) -> None:
    ledger = Ledger(root, "run")
    with ledger.open_epoch(), pytest.raises(RunError) as caught:
        ledger.delete_run()
    assert caught.value.code == "already_running"


def test_delete_row_leaves_its_neighbours_and_a_video_that_another_run_refers_to(
    root: StoragePath, tmp_path: Path
) -> None:
    one, two = Ledger(root, "one"), Ledger(root, "two")
    file = write_file(tmp_path / "v.mp4", b"video")
    with one.open_epoch() as epoch:
        for row_id, key in (("shared", KEY), ("alone", OTHER_KEY), ("neighbour", "ef" * 32)):
            must_claim(one, row_id, epoch)
            one.commit(ok(row_id, one.put_video(key, file, {})), epoch.number)
            (one.folder / "posters" / f"{row_id}.jpg").write_bytes(b"poster")
        two.find_video(KEY)
        one.delete_row("shared", KEY)
        one.delete_row("alone", OTHER_KEY)
        one.delete_row("alone", OTHER_KEY)
    assert list(one.outcomes()) == ["neighbour"]
    assert (one.folder / "posters").list_names() == ["neighbour.jpg"]
    assert {file.path.split("/")[0] for file in (one.folder / "claims").list_files()} == {"neighbour"}
    assert two.find_video(KEY) is not None
    assert two.find_video(OTHER_KEY) is None
    assert two.find_video("ef" * 32) is not None
