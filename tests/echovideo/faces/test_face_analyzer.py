from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import warnings
from collections.abc import Mapping

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from echovideo.errors import PhotoRefusedError, RequestError
from echovideo.faces.analyzer import (
    FaceAnalyzer,
    FaceLimits,
    FrameFace,
    Identity,
    align_face,
    compare,
    similarity,
    yaw_degrees,
)
from echovideo.faces.photo import decode_photo


def _png(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _distance(first: Identity, second: Identity) -> float:
    return float(np.linalg.norm(first.embedding - second.embedding))


@pytest.fixture(scope="module")
def identities(analyzer: FaceAnalyzer, photos: Mapping[str, bytes]) -> Mapping[str, Identity]:
    return {name: analyzer.analyze(photos[name]) for name in ("collins", "hopper", "obama", "obama2", "biden")}


def test_analyze_gives_box_points_quality_and_digests(
    analyzer: FaceAnalyzer, identities: Mapping[str, Identity], photos: Mapping[str, bytes]
) -> None:
    identity = identities["collins"]
    np.testing.assert_allclose(identity.box, (180, 64, 265, 173), atol=2)
    expected = [[204, 101.5], [246.6, 103.3], [225.4, 129.2], [201.6, 139.7], [245.4, 141]]
    np.testing.assert_allclose(identity.landmarks, expected, atol=2)
    assert identity.quality.detection_score > 0.99
    assert identity.quality.face_px == pytest.approx(85.4, abs=3)
    assert identity.quality.sharpness == pytest.approx(0.167, abs=0.03)
    assert abs(identity.quality.yaw_degrees) < 10
    assert identity.photo_sha256 == hashlib.sha256(photos["collins"]).hexdigest()
    assert identity.pack == analyzer.pack.name


def test_analyze_gives_a_masked_upright_face_of_512_px(identities: Mapping[str, Identity]) -> None:
    for identity in identities.values():
        face = identity.face_image
        assert face.shape == (512, 512, 3)
        assert face.dtype == np.uint8
        assert 0.5 < face.any(axis=2).mean() < 0.85
        assert face[480:, :40].max() == 0
        assert face[480:, -20:].max() == 0


def test_analyze_tells_one_person_from_others_by_distance(identities: Mapping[str, Identity]) -> None:
    assert _distance(identities["obama"], identities["obama2"]) == pytest.approx(0.415, abs=0.05)
    others = [
        _distance(identities[a], identities[b])
        for a, b in itertools.combinations(identities, 2)
        if {a, b} != {"obama", "obama2"}
    ]
    assert min(others) == pytest.approx(0.689, abs=0.05)
    assert np.mean(others) == pytest.approx(0.835, abs=0.05)


def test_analyze_of_a_photo_turned_by_exif_gives_the_same_face(
    analyzer: FaceAnalyzer, identities: Mapping[str, Identity]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = analyzer.analyze(_png(np.rot90(skimage.data.astronaut()), exif=exif))
    np.testing.assert_array_equal(turned.face_image, identities["collins"].face_image)
    np.testing.assert_array_equal(turned.embedding, identities["collins"].embedding)
    assert turned.box == identities["collins"].box


def test_analyze_of_a_large_photo_answers_in_its_own_pixels(
    analyzer: FaceAnalyzer, identities: Mapping[str, Identity]
) -> None:
    large = cv2.resize(skimage.data.astronaut(), (2560, 2560), interpolation=cv2.INTER_CUBIC)
    identity = analyzer.analyze(_png(large))
    np.testing.assert_allclose(np.array(identity.box) / 5, identities["collins"].box, atol=3)
    np.testing.assert_allclose(identity.landmarks / 5, identities["collins"].landmarks, atol=2)
    assert _distance(identity, identities["collins"]) < 0.3


def test_analyze_twice_gives_the_same_bytes(
    analyzer: FaceAnalyzer, identities: Mapping[str, Identity], photos: Mapping[str, bytes]
) -> None:
    assert analyzer.analyze(photos["obama"]).to_bytes() == identities["obama"].to_bytes()


def test_analyze_is_silent(analyzer: FaceAnalyzer, photos: Mapping[str, bytes]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analyzer.analyze(photos["collins"])


def test_identity_survives_its_bytes(identities: Mapping[str, Identity]) -> None:
    data = identities["hopper"].to_bytes()
    assert len(data) < 1_000_000
    loaded = Identity.from_bytes(data)
    for name in ("face_image", "embedding", "landmarks"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(identities["hopper"], name))
        assert getattr(loaded, name).dtype == getattr(identities["hopper"], name).dtype
    for name in ("box", "quality", "photo_sha256", "pack"):
        assert getattr(loaded, name) == getattr(identities["hopper"], name)


def test_analyze_of_several_people_takes_the_largest_face(
    lenient_analyzer: FaceAnalyzer, photos: Mapping[str, bytes]
) -> None:
    identity = lenient_analyzer.analyze(photos["six"])
    left, top, right, bottom = identity.box
    boxes, _ = lenient_analyzer.pack.detector.detect(decode_photo(photos["six"])[:, :, ::-1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert (right - left) * (bottom - top) == pytest.approx(areas.max(), rel=0.1)


def test_analyze_of_several_people_is_refused_on_demand(analyzer: FaceAnalyzer, photos: Mapping[str, bytes]) -> None:
    with pytest.raises(PhotoRefusedError, match="6 faces") as refusal:
        analyzer.analyze(photos["six"], policy="reject")
    assert refusal.value.code == "several_faces"
    assert refusal.value.numbers == {"faces": 6}
    assert analyzer.analyze(photos["collins"], policy="reject").quality.detection_score > 0.99


def test_analyze_with_an_unknown_policy_names_the_known_ones(
    analyzer: FaceAnalyzer, photos: Mapping[str, bytes]
) -> None:
    with pytest.raises(RequestError, match="largest, reject"):
        analyzer.analyze(photos["collins"], policy="smallest")  # type: ignore[arg-type]


def test_analyze_without_a_face_is_refused(analyzer: FaceAnalyzer) -> None:
    with pytest.raises(PhotoRefusedError) as refusal:
        analyzer.analyze(_png(skimage.data.coffee()))
    assert refusal.value.code == "no_face"
    assert refusal.value.numbers == {"faces": 0}
    assert pickle.loads(pickle.dumps(refusal.value)).code == "no_face"


@pytest.mark.parametrize("shape", [(64, 70_000, 3), (70_000, 64, 3)])
def test_analyze_of_a_photo_as_long_as_a_ribbon_is_refused(shape: tuple[int, ...], analyzer: FaceAnalyzer) -> None:
    with pytest.raises(PhotoRefusedError, match="no face"):
        analyzer.analyze(_png(np.zeros(shape, dtype=np.uint8)))


def test_analyze_of_a_small_face_is_refused(analyzer: FaceAnalyzer) -> None:
    canvas = np.zeros((512, 512, 3), dtype=np.uint8)
    canvas[100:356, 100:356] = cv2.resize(skimage.data.astronaut(), (256, 256), interpolation=cv2.INTER_AREA)
    with pytest.raises(PhotoRefusedError, match="px wide") as refusal:
        analyzer.analyze(_png(canvas))
    assert refusal.value.code == "too_small"
    assert refusal.value.numbers["face_px"] == pytest.approx(43, abs=3)
    assert refusal.value.numbers["min_face_px"] == 48


@pytest.mark.parametrize("name", ["collins", "hopper", "obama", "biden"])
def test_analyze_of_a_blurred_face_is_refused(
    analyzer: FaceAnalyzer, identities: Mapping[str, Identity], photos: Mapping[str, bytes], name: str
) -> None:
    sigma = 0.04 * identities[name].quality.face_px
    blurred = cv2.GaussianBlur(decode_photo(photos[name]), (0, 0), sigma)
    with pytest.raises(PhotoRefusedError, match="sharpness") as refusal:
        analyzer.analyze(_png(blurred))
    assert refusal.value.code == "blurred"
    assert refusal.value.numbers["sharpness"] < refusal.value.numbers["min_sharpness"] == 0.01


def test_analyze_of_a_turned_face_is_refused(analyzer: FaceAnalyzer, photos: Mapping[str, bytes]) -> None:
    strict = FaceAnalyzer(analyzer.pack, FaceLimits(max_yaw_degrees=10))
    with pytest.raises(PhotoRefusedError, match="turned about") as refusal:
        strict.analyze(photos["obama2"])
    assert refusal.value.code == "face_turned"
    assert refusal.value.numbers["yaw_degrees"] == pytest.approx(-14, abs=5)
    assert refusal.value.numbers["max_yaw_degrees"] == 10


@pytest.mark.parametrize("degrees", [-60, -30, 0, 20, 45])
@pytest.mark.parametrize("roll", [0, 25])
def test_yaw_of_a_turned_generic_head_is_its_turn(degrees: float, roll: float) -> None:
    head = np.array([[-1, 0, 0], [1, 0, 0], [0, 1.1, 1.0], [-0.83, 2.3, 0.25], [0.83, 2.3, 0.25]])
    turn, tilt = np.radians(degrees), np.radians(roll)
    seen = np.stack((head[:, 0] * np.cos(turn) + head[:, 2] * np.sin(turn), head[:, 1]), axis=1)
    seen = seen @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    assert yaw_degrees((seen * 40 + 200).astype(np.float32)) == pytest.approx(degrees, abs=0.1)


def test_align_face_puts_the_points_near_the_published_template() -> None:
    points = np.array([[204, 101.5], [246.6, 103.3], [225.4, 129.2], [201.6, 139.7], [245.4, 141]], dtype=np.float32)
    photo = np.zeros((512, 512, 3), dtype=np.uint8)
    for x, y in points:
        cv2.circle(photo, (round(float(x)), round(float(y))), 1, (255, 255, 255), -1)
    aligned = align_face(photo, points)
    template = np.array([[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366], [33.5493, 92.3655]])
    for x, y in template * (512 / 96, 512 / 112):
        near = aligned[max(round(y) - 40, 0) : round(y) + 40, max(round(x) - 40, 0) : round(x) + 40]
        assert near.max() > 200
    assert aligned.shape == (512, 512, 3)


def test_compare_of_frames_of_the_same_person_beats_other_people(
    analyzer: FaceAnalyzer, identities: Mapping[str, Identity], photos: Mapping[str, bytes]
) -> None:
    obama = decode_photo(photos["obama2"])[100:420]
    frames = np.stack([obama, obama[:, ::-1], np.zeros_like(obama), cv2.GaussianBlur(obama, (0, 0), 1.5)])
    faces = analyzer.analyze_frames(frames)
    assert [face is None for face in faces] == [False, False, True, False]
    scores = {name: compare(identity, faces) for name, identity in identities.items()}
    assert scores["obama"].detection_rate == 0.75
    assert scores["obama"].similarity > 0.7
    assert max(scores[name].similarity for name in ("collins", "hopper", "biden")) < 0.25


def test_analyze_frames_gives_boxes_in_frame_pixels(analyzer: FaceAnalyzer) -> None:
    small = cv2.resize(skimage.data.astronaut()[:256, 96:352], (128, 128), interpolation=cv2.INTER_AREA)
    (face,) = analyzer.analyze_frames(small[None])
    assert face is not None
    np.testing.assert_allclose(face.box, (42, 32, 85, 87), atol=3)


def test_compare_without_a_face_is_a_strangers_similarity(identities: Mapping[str, Identity]) -> None:
    for faces in ([None, None], []):
        score = compare(identities["collins"], faces)
        assert (score.similarity, score.detection_rate) == (0, 0)


def test_compare_is_the_mean_over_frames_with_a_face(identities: Mapping[str, Identity]) -> None:
    identity, other = identities["obama"], identities["biden"]
    faces = [
        FrameFace(embedding=person.embedding, box=person.box, landmarks=person.landmarks, score=1.0)
        for person in (identity, other)
    ]
    expected = (1 + similarity(identity.pack, identity.embedding, other.embedding)) / 2
    assert compare(identity, [*faces, None]).similarity == pytest.approx(expected)


def test_similarity_of_dlib_embeddings_follows_the_distance() -> None:
    origin, moved = np.zeros(128, dtype=np.float32), np.zeros(128, dtype=np.float32)
    moved[0] = 0.6
    assert similarity("dlib-0", origin, origin) == 1
    assert similarity("dlib-0", origin, moved) == pytest.approx(0.535, abs=0.001)
    assert similarity("dlib-0", origin, moved * 10) == -1


def test_similarity_of_published_embeddings_is_the_cosine() -> None:
    first = np.array([3, 0, 0], dtype=np.float32)
    assert similarity("antelopev2-0", first, np.array([1, 1, 0], dtype=np.float32)) == pytest.approx(0.5**0.5)
    assert similarity("antelopev2-0", first, np.array([-5, 0, 0], dtype=np.float32)) == pytest.approx(-1)
