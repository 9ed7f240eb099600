from dataclasses import replace
from typing import Any

import pytest

from echovideo.errors import RequestError
from echovideo.request import RenderRequest
from echovideo.settings import EngineSettings, check_tier, derived_seeds, video_key

REQUEST = RenderRequest(row_id="a", prompt="waves", photo_uri="a.png", seed=7)
SETTINGS = EngineSettings()


def key_of(request: RenderRequest = REQUEST, **changes: Any) -> str:
    values = {"photo_sha256": "photo", "face_nets": "nets", "model_digest": "model", "settings": SETTINGS}
    return video_key(request, **{**values, **changes})


@pytest.mark.parametrize("change", [{"device": "gpu"}, {"num_threads": 0}])
def test_settings_no_engine_can_have_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"gpu|num_threads 0"):
        EngineSettings(**change)


def test_video_key_ignores_what_decides_no_pixel() -> None:
    key = key_of()
    other = replace(
        REQUEST, row_id="b", photo_uri="copy/of/a.png", consent_id="c", identity_lora="anna", tags={"x": "y"}
    )
    assert key_of(other) == key
    assert len(key) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "smiles"},
        {"negative_prompt": "blur"},
        {"seed": 8},
        {"height": 496},
        {"width": 864},
        {"num_frames": 41},
        {"fps": 8},
        {"num_inference_steps": 49},
        {"guidance_scale": 5.0},
        {"guidance_schedule": "constant"},
        {"tier": "fast"},
        {"face_similarity": 0.4},
        {"tries": 2},
    ],
)
def test_video_key_changes_with_each_deciding_value(change: dict[str, object]) -> None:
    assert key_of(replace(REQUEST, **change)) != key_of()


def test_video_key_changes_with_photo_model_adapter_and_engine() -> None:
    keys = {
        key_of(),
        key_of(photo_sha256="other"),
        key_of(face_nets="other"),
        key_of(model_digest="other"),
        key_of(settings=EngineSettings(num_threads=1)),
        key_of(settings=EngineSettings(device="cuda")),
        key_of(adapter_sha256="adapter"),
        key_of(adapter_sha256="other"),
    }
    assert len(keys) == 8


def test_derived_seeds_start_with_the_rows_own_and_never_repeat() -> None:
    seeds = derived_seeds(42, 16)
    assert seeds[0] == 42
    assert len(set(seeds)) == 16
    assert derived_seeds(42, 3) == seeds[:3]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_tier_that_the_engine_does_not_give_is_refused() -> None:
    check_tier("exact")
    with pytest.raises(RequestError, match="'fast' is not available here") as caught:
        check_tier("fast")
    assert caught.value.code == "tier_unavailable"
