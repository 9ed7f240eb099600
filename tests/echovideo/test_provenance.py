import json

from echovideo.model.card import ModelCard
from echovideo.provenance import container_metadata, sidecar_basis
from echovideo.request import RenderRequest
from echovideo.settings import NUMERICS_VERSION, EngineSettings

CARD = ModelCard(name="EchoVideo-5B", licence="CC BY-NC 4.0")
REQUEST = RenderRequest(row_id="row-7", prompt="p" * 300, photo_uri="a.png", consent_id="c-1", tags={"client": "x"})


def test_container_metadata_names_model_licence_and_that_it_is_generated() -> None:
    metadata = container_metadata(REQUEST, CARD, seed=9)
    assert metadata["licence"] == "CC BY-NC 4.0"
    assert metadata["ai_generated"] == "true"
    assert metadata["seed"] == "9"
    assert len(metadata["title"]) == 200


def test_container_metadata_of_another_row_with_the_same_pixels_is_the_same() -> None:
    other = RenderRequest(row_id="row-8", prompt=REQUEST.prompt, photo_uri="b.png")
    assert container_metadata(other, CARD, seed=9) == container_metadata(REQUEST, CARD, seed=9)


def test_sidecar_basis_holds_every_setting_and_reads_back_from_json() -> None:
    basis = json.loads(json.dumps(sidecar_basis(REQUEST, CARD, EngineSettings(), photo_sha256="00")))
    assert basis["request"]["consent_id"] == "c-1"
    assert basis["request"]["photo_sha256"] == "00"
    assert {"seed", "height", "width", "num_frames", "guidance_schedule", "tier"} <= set(basis["request"])
    assert basis["engine"] == {"version": NUMERICS_VERSION, "device": "cpu", "num_threads": 2}
