from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from echovideo.faces.analyzer import FaceAnalyzer
from echovideo.faces.packs import open_pack
from flows.demo import PROMPTS, write_demo


def test_demo_photos_have_a_face_that_passes_except_the_last(tmp_path: Path, tiny_folder: Path) -> None:
    rows = pq.read_table(write_demo(tmp_path)).to_pylist()
    photos = {Path(row["photo_uri"]).name for row in rows}
    assert photos == {"ada.png", "ben.png", "cleo.png", "coffee.png"}
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    analyzer = FaceAnalyzer(open_pack(tiny_folder / "face_encoder"))
    for name in sorted(photos - {"coffee.png"}):
        photo = tmp_path / "photos" / name
        assert Image.open(photo).size == (384, 384)
        assert analyzer.analyze(photo.read_bytes()).quality.face_px > 100
