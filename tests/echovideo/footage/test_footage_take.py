"""Drawn people through the real face nets: what is seen, refused and taken of files of footage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from echovideo.faces.analyzer import FaceAnalyzer, FaceLimits
from echovideo.footage.plan import FootageSettings, Plan, plan_take
from echovideo.footage.scan import FootageError, scan_footage
from echovideo.footage.sheet import scan_sheet, take_sheet
from echovideo.footage.take import Take, face_mask, face_share, take_footage
from tests.echovideo.footage.drawn import FRAMES, drawn_clips, write

Clips = Mapping[str, NDArray[np.uint8]]


def take_of(path: Path, analyzer: FaceAnalyzer, settings: FootageSettings) -> Take:
    return take_footage(path, plan_take(scan_footage(path, analyzer, settings.fps), settings), analyzer, "digest")


@pytest.fixture(scope="module")
def ann(
    tmp_path_factory: pytest.TempPathFactory, clips: Clips, analyzer: FaceAnalyzer, settings: FootageSettings
) -> Take:
    """What is taken of ann-1 at the right edge of a wide picture."""
    wide = np.full((FRAMES, 96, 240, 3), 90, np.uint8)
    wide[:, :, 144:] = clips["ann-1"]
    return take_of(write(wide, tmp_path_factory.mktemp("wide") / "wide.mp4"), analyzer, settings)


def test_take_crops_to_the_face_and_its_frames_are_the_files(ann: Take, clips: Clips) -> None:
    assert ann.plan.crop == (144, 0, 240, 96)
    assert ann.plan.frame_indices == tuple(range(3, 20))
    difference = ann.frames_FHWC.astype(int) - clips["ann-1"][3:20]
    assert np.abs(difference).mean() < 6


def test_face_mask_covers_the_drawn_face_and_hair(ann: Take) -> None:
    true = drawn_clips(FRAMES)["ann-1"].face[3:20]
    overlap = np.minimum(true, ann.face_FHW).sum() / np.maximum(true, ann.face_FHW).sum()
    assert overlap > 0.75


def test_references_are_the_persons_faces_on_black_with_their_quality(ann: Take) -> None:
    assert len(ann.references) == 3
    for identity in ann.references.values():
        assert identity.photo_sha256 == "digest"
        assert 0.2 < (identity.face_image.max(axis=2) == 0).mean() < 0.8
        assert 30 < identity.quality.face_px < 60
        assert identity.embedding.shape == (128,)


def test_cut_in_the_middle_is_found_and_only_the_longer_shot_is_used(
    tmp_path: Path, clips: Clips, analyzer: FaceAnalyzer, settings: FootageSettings
) -> None:
    path = write(np.concatenate((clips["ann-1"][:5], clips["ann-2"][:19])), tmp_path / "cut.mp4")
    take = take_of(path, analyzer, settings)
    assert take.plan.shots == 2
    assert take.plan.frame_indices == tuple(range(6, 23))


def test_stride_follows_the_files_own_rate(
    tmp_path: Path, clips: Clips, analyzer: FaceAnalyzer, settings: FootageSettings
) -> None:
    path = write(np.repeat(clips["ann-1"], 2, axis=0), tmp_path / "fast.mp4", fps=32)
    scan = scan_footage(path, analyzer, settings.fps)
    assert [sighting.frame_index for sighting in scan.sightings] == list(range(0, 48, 2))


def test_larger_footage_is_scaled_to_the_size(
    tmp_path: Path, clips: Clips, ann: Take, analyzer: FaceAnalyzer, settings: FootageSettings
) -> None:
    large = clips["ann-1"].repeat(2, axis=1).repeat(2, axis=2)
    take = take_of(write(large, tmp_path / "large.mp4"), analyzer, settings)
    assert take.plan.crop == (0, 0, 192, 192)
    assert take.frames_FHWC.shape == (17, 96, 96, 3)
    assert np.abs(take.frames_FHWC.astype(int) - ann.frames_FHWC).mean() < 4
    assert np.abs(take.face_FHW - ann.face_FHW).mean() < 0.03


def test_unusable_footage_is_refused_with_its_code(
    tmp_path: Path, clips: Clips, analyzer: FaceAnalyzer, settings: FootageSettings
) -> None:
    people = np.concatenate((clips["ann-1"], clips["bob-1"]), axis=2)
    footage = {
        "several_people": write(people, tmp_path / "two.mp4"),
        "no_face": write(np.full((20, 96, 96, 3), 90, np.uint8), tmp_path / "none.mp4"),
        "too_short": write(clips["ann-1"][:10], tmp_path / "short.mp4"),
        "unreadable": tmp_path / "noise.mp4",
    }
    footage["unreadable"].write_bytes(footage["too_short"].read_bytes()[:700])
    codes = {}
    for code, path in footage.items():
        with pytest.raises(FootageError) as caught:
            take_of(path, analyzer, settings)
        codes[code] = caught.value.code
    assert codes == {code: code for code in footage}


def test_footage_without_one_good_face_is_refused(
    tmp_path: Path, clips: Clips, analyzer: FaceAnalyzer, settings: FootageSettings
) -> None:
    path = write(clips["ann-1"][:18], tmp_path / "clip.mp4")
    strict = FaceAnalyzer(analyzer.pack, FaceLimits(min_face_px=24, min_sharpness=9))
    with pytest.raises(FootageError, match="can be a reference") as caught:
        take_of(path, strict, settings)
    assert (caught.value.code, caught.value.numbers) == ("no_reference", {"faces_tried": 9})


def test_face_that_was_not_seen_or_not_parsed_is_its_box(ann: Take, analyzer: FaceAnalyzer) -> None:
    class Blind:
        def mask(self, face: NDArray[np.uint8]) -> NDArray[np.bool_]:
            return np.zeros((512, 512), np.bool_)

    plan: Plan = replace(ann.plan, crop=(20, 10, 212, 202))
    frame, box = np.zeros((240, 240, 3), np.uint8), (60.0, 30.0, 99.0, 69.0)
    unseen = face_mask(frame, None, box, plan, analyzer.pack.parser)
    expected = np.zeros((96, 96), np.float32)
    expected[10:30, 20:40] = 1
    np.testing.assert_array_equal(unseen, expected)
    np.testing.assert_array_equal(face_mask(frame, ann.plan.faces[0], box, plan, Blind()), expected)


def test_face_share_is_the_mean_over_each_latent_cells_pixels_and_frames() -> None:
    face = np.zeros((9, 16, 24), np.float32)
    face[0, :8, :8] = 1
    face[1:3, 8:, 16:] = 1
    face[5:9, :4, 8:16] = 0.5
    share = face_share(face)
    expected = np.zeros((3, 2, 3), np.uint8)
    expected[0, 0, 0], expected[1, 1, 2], expected[2, 0, 1] = 255, 128, 64
    np.testing.assert_array_equal(share, expected)


def test_sheets_show_frames_crops_and_references(
    tmp_path: Path, clips: Clips, analyzer: FaceAnalyzer, settings: FootageSettings
) -> None:
    path = write(clips["ann-1"], tmp_path / "clip.mp4")
    sheet = take_sheet(path, take_of(path, analyzer, settings))
    assert sheet.size == (960, 480)
    pink = np.asarray(sheet)[160:320].astype(int)
    assert ((pink[..., 0] - pink[..., 1]) > 100).mean() > 0.1
    assert scan_sheet(path, scan_footage(path, analyzer, 16.0)).size == (960, 160)
