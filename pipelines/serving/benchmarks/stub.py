"""Stages without networks, which take as long as a request's tags say, and the model folder that they work with."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

from echovideo.conditioning import Condition
from echovideo.engine import KeepGoing, Rendered
from echovideo.errors import RenderCancelledError
from echovideo.faces.analyzer import FaceAnalyzer
from echovideo.faces.packs import open_pack
from echovideo.model.card import ModelCard, write_card
from echovideo.model.config import TransformerConfig
from echovideo.request import RenderRequest
from echovideo.tiny.folder import ensure_tiny
from echovideo.training.adapters import AdapterSlot
from echovideo.video import poster_jpeg
from pipelines.ledger import Claim
from pipelines.stages.render import RenderStage
from pipelines.stages.row import Row
from pipelines.stages.stage import Stage

HOLD = "hold"
"""While a file of this name lies in the model's folder, no stage begins."""
_HOLD_CHECK_S = 0.1


class StubIdentity(Stage):
    """Gives every row the identity that the model's folder holds."""

    name = "identity"

    def work(self, row: Row, claim: Claim) -> Row:
        while (Path(self.config.model) / HOLD).exists():
            time.sleep(_HOLD_CHECK_S)
        return replace(row, identity=(Path(self.config.model) / "identity.safetensors").read_bytes())


class StubCondition(Stage):
    """Gives every row the condition that the model's folder holds."""

    name = "condition"

    def work(self, row: Row, claim: Claim) -> Row:
        if row.request.tags.get("raise"):
            raise ValueError("as the request says")
        return replace(row, condition=(Path(self.config.model) / "condition.safetensors").read_bytes())


class StubRenderer:
    """Sleeps `step_s` (a tag, seconds) before each step is done, and draws noise."""

    def __init__(self) -> None:
        self.adapter = AdapterSlot(torch.nn.Module())

    def render(self, condition: Condition, request: RenderRequest, seed: int, keep_going: KeepGoing) -> Rendered:
        started, steps = time.perf_counter(), request.num_inference_steps
        for step in range(steps):
            if not keep_going(step, steps, _draw):
                raise RenderCancelledError("as asked")
            time.sleep(float(request.tags.get("step_s", "0")))
        shape = (request.num_frames, request.height, request.width, 3)
        frames = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
        return Rendered(frames_FHWC=frames, timings={"denoise": time.perf_counter() - started})


class StubRender(RenderStage):
    """The real render stage around the stub renderer."""

    def open_renderer(self) -> StubRenderer:
        return StubRenderer()


def stub_stages() -> Sequence[type[Stage]]:
    """Return the stages that stand for a model's."""
    return StubIdentity, StubCondition, StubRender


def make_model(folder: Path) -> Path:
    """Write the stub's model folder: real face nets for the photo check, one identity, one condition, and a card."""
    tiny = ensure_tiny(folder)
    model = folder / "model"
    shutil.copytree(tiny / "face_encoder", model / "face_encoder")
    write_card(ModelCard(name="stub", licence="none", judged=False), model)
    (model / "transformer").mkdir()
    (model / "transformer" / "config.json").write_text(json.dumps(TransformerConfig().to_dict()))
    identity = FaceAnalyzer(open_pack(model / "face_encoder")).analyze(photo_of(0))
    (model / "identity.safetensors").write_bytes(identity.to_bytes())
    mean, std = torch.zeros(16, 12, 12), torch.ones(16, 12, 12)
    condition = Condition(fused_2ND=torch.zeros(2, 226, 8), face_mean_CHW=mean, face_std_CHW=std)
    (model / "condition.safetensors").write_bytes(condition.to_bytes())
    return model


def photo_of(number: int) -> bytes:
    """Return one of many different photographs of Eileen Collins (NASA, public domain): JPEG, 512 px, about 100 kB."""
    buffer = io.BytesIO()
    pixels = np.roll(skimage.data.astronaut(), number, axis=0)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _draw() -> bytes:
    return poster_jpeg(np.zeros((64, 96, 3), np.uint8))
