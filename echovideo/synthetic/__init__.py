"""People drawn by code: a world in which it is known who is in a video and what happens there.

A person is a seed: `people(SPLITS["train"][:4])` gives four, with named identity parameters (face, eyes, brows, nose,
mouth, skin tone, freckles and moles, natural hair). A clip's condition says all else: pose, motion, expression, light,
hair style and dye, glasses, clothes, background. `caption` puts a condition into words and `read_caption` gets it back.
`draw` returns the frames, the face and hair masks and the five face points; `draw_references` neutral photographs.

    people(seeds) ----------------------> Person --------> identity tensor (B, parameters) --+
    sample_conditions(seeds) -----------> ClipCondition -> scene tensor (B, frames, curves) -+-> draw -> Drawing
                                          ClipCondition -> caption <-> read_caption

The same seeds give the same people and clips on every device, alone or in a batch. Loops that train draw on the GPU
with `compiled=True` and call `identity_parameters`, `scene_curves` and `draw_tensors`, which take tensors.

`python -m echovideo.synthetic.check` measures that the embedded face nets see these people as people;
`python -m echovideo.synthetic.throughput` how fast they are drawn. The first needs the whole project, drawing needs
torch alone.
"""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
