"""The RayService manifest names what is there: import path, settings, Ray's version, ports and GPUs."""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.serving.app import PROXY_ENVIRONMENT
from pipelines.serving.config import ServiceConfig

FOLDER = Path(__file__).parents[2] / "infra/kuberay"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    """The manifest's spec."""
    manifest = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    spec: dict[str, Any] = manifest["spec"]
    return spec


def test_rayservice_config_is_one_that_serve_takes_and_its_builder_exists(spec: dict[str, Any]) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    [application] = config.applications
    module, _, name = application.import_path.partition(":")
    builder = getattr(import_module(module), name)
    assert list(inspect.signature(builder).parameters) == ["settings"]


def test_rayservice_settings_make_a_service_config(spec: dict[str, Any], tiny_folder: Path) -> None:
    [application] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    args = application["args"]
    assert set(args) <= {field.name for field in fields(ServiceConfig)}
    # The model's folder is the cluster's; any will do to read the rest.
    config = ServiceConfig.of_model(**{**args, "model": str(tiny_folder)})
    assert config.engine.device == "cuda"
    assert config.batch_roots == ("s3://STUDIO-BUCKET/manifests/{tenant}",)
    assert config.input_roots("web")[1] == "s3://STUDIO-BUCKET/manifests/web"
    assert config.secure_cookies


def test_rayservice_cluster_has_serves_port_rays_version_and_a_gpu_for_each_renderer(spec: dict[str, Any]) -> None:
    serve = yaml.safe_load(spec["serveConfigV2"])
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    assert f"ray:{ray.__version__}-" in (FOLDER / "Dockerfile").read_text()
    [group] = cluster["workerGroupSpecs"]
    groups = (cluster["headGroupSpec"], group)
    containers = [each["template"]["spec"]["containers"][0] for each in groups]
    assert len({container["image"] for container in containers}) == 1
    for container in containers:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == serve["http_options"]["port"]
        assert {each["name"]: each["value"] for each in container["env"]} == PROXY_ENVIRONMENT
        assert container["envFrom"] == [{"secretRef": {"name": "echovideo-s3"}}]
    gpus = int(containers[1]["resources"]["limits"]["nvidia.com/gpu"]) * group["replicas"]
    assert gpus == serve["applications"][0]["args"]["num_renderers"]
    probe = containers[1]["readinessProbe"]["httpGet"]
    assert (probe["path"], probe["port"]) == ("/-/healthz", serve["http_options"]["port"])
    mounted = containers[1]["volumeMounts"][0]["mountPath"]
    assert serve["applications"][0]["args"]["model"].startswith(mounted + "/")
