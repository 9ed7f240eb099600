"""The Serve application: ingress, dispatcher, face check and renderers, bound together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pipelines.serving.config import ServiceConfig
from pipelines.serving.dispatcher import Dispatcher
from pipelines.serving.faces import FaceCheck
from pipelines.serving.renderer import Renderer

if TYPE_CHECKING:
    from pipelines.stages.stage import Stage

_MANY = 10_000
"""Calls that wait for something to happen, such as a watched video, are held open and cost next to nothing."""
_LONGEST_RENDER_S = 1800.0
_HEALTH_CHECK_S = 2.0
"""How soon a dead replica is noticed, and another started."""


_LONG_MESSAGES = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "-1"}
"""A photo comes in one message, and gRPC's own limit is 4 MB; bodies have theirs."""
_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""What only waits needs one event loop; three of them in a process keep each other waiting."""
PROXY_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Else it reports each request to a Python process.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
}
"""HAProxy hands requests to the ingress's own HTTP server, at a fraction of what Serve's proxy in Python costs.

Whoever starts a Ray for the service gives it this environment.
"""
_QUIET = LoggingConfig(enable_access_log=False)
"""Nobody reads a line a request."""


@serve.ingress()
class Ingress:
    """Answers HTTP. It loads no networks, so it is there at once."""

    def __init__(self, config: ServiceConfig, dispatcher: DeploymentHandle[Any], faces: DeploymentHandle[Any]) -> None:
        self.config, self.dispatcher, self.faces = config, _by_grpc(dispatcher), _by_grpc(faces)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Here, because the application of a deployment's module would have to be pickled.
        from pipelines.serving.api.app import create_api
        from pipelines.serving.api.service import Service

        return create_api(Service(self.config, self.dispatcher, self.faces))


def _by_grpc(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """Return a handle whose calls are answered sooner than as Ray tasks, a photo in them above all."""
    return handle.options(_by_reference=False, request_serialization="pickle", response_serialization="pickle")


def real_stages() -> Sequence[type[Stage]]:
    """Return the batch path's stages; called where torch is wanted."""
    from pipelines.run import STAGES

    return STAGES


def bind(config: ServiceConfig, load_stages: Callable[[], Sequence[type[Stage]]] = real_stages) -> Application:
    """Return the application of a config, for serve.run."""
    shares = config.on_demand("any").stages()
    renderers = serve.deployment(
        num_replicas=config.num_renderers,
        max_ongoing_requests=1,
        # A render in progress outlives an upgrade or a smaller number of replicas.
        graceful_shutdown_timeout_s=_LONGEST_RENDER_S,
        health_check_period_s=_HEALTH_CHECK_S,
        ray_actor_options={
            "num_cpus": sum(share.num_cpus for share in shares.values()),
            "num_gpus": min(1.0, sum(share.num_gpus for share in shares.values())),
        },
    )(Renderer).bind(config, load_stages)
    faces = serve.deployment(
        max_ongoing_requests=8,
        max_queued_requests=32,
        ray_actor_options={
            "num_cpus": shares["identity"].num_cpus,
            "runtime_env": {"env_vars": _LONG_MESSAGES},
        },
    )(FaceCheck).bind(config)
    light = {"num_cpus": 0.1, "runtime_env": {"env_vars": _ONE_LOOP | _LONG_MESSAGES}}
    dispatcher = serve.deployment(
        max_ongoing_requests=_MANY,
        health_check_period_s=_HEALTH_CHECK_S,
        ray_actor_options=light,
        logging_config=_QUIET,
    )(Dispatcher).bind(config, renderers, faces)
    ingress = serve.deployment(
        max_ongoing_requests=_MANY,
        ray_actor_options=light,
        logging_config=_QUIET,
    )(Ingress)
    return ingress.bind(config, dispatcher, faces)


def build(settings: Mapping[str, Any]) -> Application:
    """Return the application of a deployment's YAML: `store`, `model`, and what else ServiceConfig has."""
    return bind(ServiceConfig.of_model(**settings))
