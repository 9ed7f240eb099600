"""How much longer the service takes for a video than its engine: `python -m pipelines.serving.benchmarks.service_time`.

One video at a time, in turns: Engine.render alone, and a renderer's whole work on a job. That work is the code which
Serve's replica runs: claim, a report before each step, a preview every half second, MP4, upload, read back and digest,
sidecar, poster, outcome. Reports go to a Ray actor in another process and are waited for. Not in it: HTTP, Serve's
routing of each report, the queue, and the identity and condition stages, whose results are given. Results go to
results/service_time.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
from diffusers import AutoencoderKLCogVideoX

from echovideo.conditioning import SPATIAL_COMPRESSION, Condition
from echovideo.engine import Engine, model_dtype
from echovideo.errors import RunError
from echovideo.faces.analyzer import FaceQuality, Identity
from echovideo.model.card import TINY, ModelCard
from echovideo.model.config import TransformerConfig
from echovideo.model.folder import vae_dtype
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.request import RenderRequest, parse_size
from echovideo.results import Row, write_results
from echovideo.settings import EngineSettings
from echovideo.tiny.folder import ensure_tiny
from echovideo.tiny.parts import scheduler
from pipelines.ledger import Ledger
from pipelines.outcome import Ok
from pipelines.serving.benchmarks import RESULTS
from pipelines.serving.benchmarks.stub import StubCondition, StubIdentity
from pipelines.serving.config import ServiceConfig
from pipelines.serving.path import WholePath
from pipelines.serving.records import Job
from pipelines.stages.render import RenderStage

BAR = 1.02
_TENANT = "bench"
_WARM_UP_STEPS = 2


@ray.remote(num_cpus=0)
class Listener:
    """Hears a renderer's reports in the dispatcher's place."""

    def report(self, name: tuple[str, str, str], epoch: int, step: int, steps: int, preview: bytes | None) -> bool:
        """Take a report in, and let the job go on."""
        return True


def random_engine(settings: EngineSettings) -> Engine:
    """Return an engine of the published model's sizes, with random weights."""
    dtype = model_dtype(settings)
    with torch.device(settings.device):
        transformer = EchoVideoTransformer3DModel(TransformerConfig()).to(dtype)
        vae = AutoencoderKLCogVideoX(scaling_factor=0.7).to(vae_dtype(dtype))
    return Engine(transformer.eval(), vae.eval(), scheduler(), settings)


def measure(engine: Engine, request: RenderRequest, rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the rows of an engine's time for a request with and without the service around it."""
    condition = _write_given(engine, request, folder)
    config = ServiceConfig(
        store=str(folder / "store"),
        model=str(folder),
        model_digest="random",
        card=ModelCard(name="random", licence="none", judged=False),
        engine=engine.settings,
    )
    run = config.on_demand(_TENANT)

    class Given(RenderStage):
        def open_renderer(self) -> Engine:
            return engine

    path = WholePath(run, 0, (StubIdentity, StubCondition, Given))
    listener = Listener.remote()  # type: ignore[attr-defined]
    with Ledger(run.output_path, run.run_id).open_epoch() as epoch:

        def bare(request: RenderRequest) -> dict[str, float]:
            engine.render(condition, request, request.seed, lambda step, steps, draw: True)
            return {}

        def served(request: RenderRequest) -> dict[str, float]:
            job = Job(tenant=_TENANT, run_id=run.run_id, epoch=epoch.number, request=request)
            waited = 0.0

            def report(step: int, steps: int, preview: bytes | None) -> bool:
                nonlocal waited
                started = time.perf_counter()
                answer: bool = ray.get(listener.report.remote(job.name, job.epoch, step, steps, preview))
                waited += time.perf_counter() - started
                return answer

            outcome = path.render(job, run, report)
            if not isinstance(outcome, Ok):
                raise RunError(f"the render ended with {outcome}", code="no_video")
            return {**outcome.timings, "reports": waited}

        # A seed of its own: asked for as few steps, the measured video would be found already made.
        warm_up = replace(request, num_inference_steps=_WARM_UP_STEPS, seed=request.seed - 1)
        bare(warm_up)
        served(replace(warm_up, row_id="warm-up"))
        seconds: dict[str, list[float]] = {"bare": [], "served": []}
        parts: list[dict[str, float]] = []
        for number in range(rounds):
            # Another seed is another video; the same one would be found and not rendered again.
            asked = replace(request, row_id=f"video-{number}", seed=request.seed + number)
            seconds["bare"].append(_timed(bare, asked)[0])
            took, made = _timed(served, asked)
            seconds["served"].append(took)
            parts.append(made)
    height, width = request.height, request.width
    shape = f"{width}x{height}, {request.num_frames} frames, {request.num_inference_steps} steps"
    for kind, each in seconds.items():
        against = {f"round {number + 1}": took for number, took in enumerate(each)}
        yield Row(name=shape, metric=f"{kind}: time a video", value=statistics.median(each), unit="s", against=against)
    for part in ("denoise", "decode", "encode", "reports"):
        value = statistics.median(made[part] for made in parts)
        yield Row(name=shape, metric=f"served: {part}", value=value, unit="s")
    ratios = [served_s / bare_s for bare_s, served_s in zip(seconds["bare"], seconds["served"], strict=True)]
    against = {f"round {number + 1}": ratio for number, ratio in enumerate(ratios)}
    yield Row(
        name=shape, metric="served over bare", value=statistics.median(ratios), unit="", floor=BAR, against=against
    )


def _timed(work: Callable[[RenderRequest], dict[str, float]], request: RenderRequest) -> tuple[float, dict[str, float]]:
    started = time.perf_counter()
    parts = work(request)
    return time.perf_counter() - started, parts


def _write_given(engine: Engine, request: RenderRequest, folder: Path) -> Condition:
    """Write the identity and the condition that the stub stages give, and return the condition."""
    config, random = engine.transformer.config, torch.Generator().manual_seed(0)
    fused = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=random)
    cells = (16, request.height // SPATIAL_COMPRESSION, request.width // SPATIAL_COMPRESSION)
    mean, std = torch.randn(cells, generator=random), torch.ones(cells)
    condition = Condition(fused_2ND=fused, face_mean_CHW=mean, face_std_CHW=std)
    identity = Identity(
        face_image=np.zeros((512, 512, 3), np.uint8),
        embedding=np.zeros(512, np.float32),
        box=(0.0, 0.0, 1.0, 1.0),
        landmarks=np.zeros((5, 2), np.float32),
        quality=FaceQuality(detection_score=1.0, face_px=512.0, sharpness=1.0, yaw_degrees=0.0),
        photo_sha256="0" * 64,
        pack="none",
    )
    (folder / "identity.safetensors").write_bytes(identity.to_bytes())
    (folder / "condition.safetensors").write_bytes(condition.to_bytes())
    return condition


def main() -> None:
    """Measure on the GPU with random weights of the published sizes, or on the CPU with the tiny model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tiny", action="store_true", help="the tiny model on the CPU")
    parser.add_argument("--size", default="wide", help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=49, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file; default: %(default)s")
    parser.add_argument("--commit", help="what to note as the commit; default: HEAD")
    asked = parser.parse_args()
    height, width = parse_size(asked.size)
    request = RenderRequest(
        row_id="video",
        prompt="she waves",
        photo_uri="given",
        height=height,
        width=width,
        num_frames=asked.frames,
        num_inference_steps=asked.steps,
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="echovideo-bench-") as name:
        folder = Path(name)
        if asked.tiny:
            engine = Engine.open(ensure_tiny(folder), EngineSettings(device="cpu"))
            machine = f"CPU, model {TINY.name}"
        else:
            engine = random_engine(EngineSettings(device="cuda"))
            machine = f"{torch.cuda.get_device_name()}, random weights of the published sizes"
        rows = []
        for row in measure(engine, request, asked.rounds, folder):
            rows.append(row)
            print(f"{row.name}  {row.metric:24} {row.value:10.4f} {row.unit}", flush=True)
    write_results(
        "service_time", rows, asked.out, machine=machine, packages=("ray", "torch", "diffusers"), commit=asked.commit
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
