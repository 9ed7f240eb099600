"""The service on this machine: a Ray and a Serve of its own, from the first sign of life to the last job's end."""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ServeStatus

from echovideo.errors import RunError
from pipelines.resources import SPARE_CPUS, StageResources, check_resources
from pipelines.serving.app import PROXY_ENVIRONMENT, bind, real_stages
from pipelines.serving.config import ServiceConfig

if TYPE_CHECKING:
    from pipelines.stages.stage import Stage

APP = "echovideo"
_POLL_S = 0.2
_PROXY_PORTS = (
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
)


class LocalService:
    """A service that this process started and ends."""

    def __init__(
        self,
        config: ServiceConfig,
        host: str,
        port: int,
        load_stages: Callable[[], Sequence[type[Stage]]] = real_stages,
    ) -> None:
        self.config = config
        self.url = f"http://{host}:{port}"
        _check_free(host, port)
        shares = [
            StageResources(
                name=stage.name, actors=config.num_renderers, num_cpus=stage.num_cpus, num_gpus=stage.num_gpus
            )
            for stage in config.on_demand("any").stages().values()
        ]
        others = StageResources(name="ingress, dispatcher and face check", actors=1, num_cpus=0.4)
        # Shares are no more than bookkeeping here: a machine of one processor runs it too, slowly.
        need = sum(each.actors * each.num_cpus for each in (*shares, others)) + SPARE_CPUS
        # Ray's own news are for its operator; here that is somebody who waits for an address.
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._folder = tempfile.TemporaryDirectory(prefix="ev-", dir="/tmp")
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(need)),
            include_dashboard=False,
            runtime_env={"env_vars": PROXY_ENVIRONMENT | own_proxy(Path(self._folder.name))},
            # Ray's workers yield to everything else on the machine by default; here only renderers are to.
            _system_config={"worker_niceness": 0},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            check_resources((*shares, others), ray.cluster_resources())
            serve.start(http_options={"host": host, "port": port})
            target = serve.RunTarget(bind(config, load_stages), name=APP, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
        except BaseException:
            self.stop()
            raise

    def wait_until_answering(self, say: Callable[[str], None]) -> None:
        """Return once requests are taken; they wait for what still loads. Raises RunError `service_failed`."""
        while True:
            say(self._progress())
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(_POLL_S)

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """Return once every replica has loaded its networks; raises RunError `service_failed` with the reason."""
        while (progress := self._progress()) != "ready":
            say(progress)
            time.sleep(_POLL_S)

    def drain(self) -> None:
        """Let what runs end; what waits stays in the records for the next start."""
        serve.get_deployment_handle("Dispatcher", APP).drain.remote().result()

    def stop(self) -> None:
        """End Serve and Ray."""
        serve.shutdown()
        ray.shutdown()
        self._folder.cleanup()

    def _progress(self) -> str:
        status: ServeStatus = serve.status()
        app = status.applications.get(APP)
        if app is None:
            return "starting"
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            reasons = [deployment.message for deployment in app.deployments.values() if deployment.message]
            reason = "; ".join([*reasons, app.message]).strip()
            lines = [line for line in reason.splitlines() if line.strip()]
            raise RunError(f"the service did not start: {lines[-1] if lines else app.status}", code="service_failed")
        if app.status == ApplicationStatus.RUNNING:
            return "ready"
        loading = [name for name, deployment in app.deployments.items() if deployment.status != "HEALTHY"]
        return f"loading: {', '.join(loading)}" if loading else "starting"


def own_proxy(folder: Path) -> dict[str, str]:
    """Return the environment that keeps a Ray's HAProxy apart from the machine's others: free ports, files in `folder`.

    Its control socket is open to all who reach the folder, so that is to be the caller's alone, and its path short.
    """
    ports = free_ports(len(_PROXY_PORTS))
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # It goes when its service does; nobody has to notice first.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        **{name: str(port) for name, port in zip(_PROXY_PORTS, ports, strict=True)},
    }


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, below those that Ray's own parts and outgoing connections take."""
    found = []
    for port in random.sample(range(20_000, 30_000), 1000):
        try:
            with socket.create_server(("", port)):
                found.append(port)
        except OSError:
            continue
        if len(found) == count:
            return found
    raise RunError(f"there are not {count} free ports between 20000 and 30000", code="port_in_use")


def _check_free(host: str, port: int) -> None:
    """Raise RunError `port_in_use` now, rather than after Ray has started."""
    try:
        with socket.create_server((host, port)):
            return
    except OSError as error:
        raise RunError(
            f"{host}:{port} cannot be listened on: {error}; choose another --port", code="port_in_use"
        ) from error
