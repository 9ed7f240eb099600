"""The ablation's page, one HTML file: each claim and whether it held, every arm's scores, plots and examples."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from echovideo.evaluation.ablation import Run, measurements_of
from echovideo.evaluation.claims import CLAIMS, DIAL, Measured, Reading, Verdict, judge_claim, readings
from echovideo.evaluation.scores import CHANCE, IN_REFERENCE, SCORES, share_of_ceiling

COLUMNS = (
    "rank_1",
    "identity_r2",
    "attributes",
    "copy_paste_index",
    "text_follow_index",
    "m_cp",
    "text_wins",
    "reference_wins",
    "detail",
    "skin_tone_slope",
    "accepted",
)
_COLOURS = ("#2f55b5", "#c22b2b", "#2f8a4c", "#b8860b", "#7a3fa0", "#0f8a94", "#d0582a", "#55606e")
_WIDTH, _HEIGHT, _MARGIN = 460, 300, 48

_TEMPLATE = Path(__file__).parent / "ablation.html"


def write_page(runs: Sequence[Run], people: int, path: Path) -> None:
    """Write the page of these runs; claims whose arms have not run yet are marked so."""
    seeds = sorted({run.seed for run in runs})
    seed_readings = {seed: measurements_of(runs, seed) for seed in seeds}
    first = [run for run in runs if run.seed == seeds[0]]
    ceiling = {reading.score: measured for reading, measured in seed_readings[seeds[0]].items()}
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    page = environment.from_string(_TEMPLATE.read_text()).render(
        people=people,
        seeds=seeds,
        claims=CLAIMS,
        verdicts={seed: verdicts(found) for seed, found in seed_readings.items()},
        columns=[name for name in COLUMNS if name in ceiling],
        scores=SCORES,
        table=[
            {
                "arm": run.arm,
                "seed": run.seed,
                "steps": run.steps,
                "strength": f"{strength:g}",
                "cells": [
                    _cell(name, run.measurements[Reading(arm=run.arm, score=name, face_latent=strength)])
                    for name in COLUMNS
                    if name in ceiling
                ],
            }
            for run in runs
            for strength in run.examples
        ],
        ceilings=[_plain(ceiling[name].ceiling) for name in COLUMNS if name in ceiling],
        chances=[_plain({"rank_1": 1 / people, **CHANCE}.get(name)) for name in COLUMNS if name in ceiling],
        plots=plots(runs),
        arms={run.arm: f"{run.meaning} ({run.steps} steps)" for run in first},
        example_names=[run.arm for run in first],
        examples=[
            {
                "reference": _picture(first[0].references[number]),
                "prompt": prompt,
                "clips": [_picture(np.concatenate(list(_own(run)[number]), axis=1)) for run in first],
            }
            for number, prompt in enumerate(first[0].prompts)
        ],
    )
    path.write_text(page)


def verdicts(measurements: Mapping[Reading, Measured]) -> dict[str, Verdict | None]:
    """Return each claim's verdict by name, None where an arm that it needs was not run."""
    return {
        claim.name: judge_claim(claim, measurements) if readings([claim]) <= set(measurements) else None
        for claim in CLAIMS
    }


def plots(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the titled plots: copying against identity, conflicts, the dial."""
    colours = {arm: _COLOURS[i % len(_COLOURS)] for i, arm in enumerate(dict.fromkeys(run.arm for run in runs))}
    series: dict[str, list[tuple[str, str, list[tuple[float, float]]]]] = {
        "copy": [],
        "wins": [],
        "cpi": [],
        "detail": [],
    }
    for run in runs:
        label, colour, own = f"{run.arm} {run.seed}", colours[run.arm], _strength(run)

        def at(score: str, strength: float, run: Run = run) -> float:
            return run.measurements[Reading(arm=run.arm, score=score, face_latent=strength)].value

        series["copy"].append((label, colour, [(at("identity_r2", own), at("copy_paste_index", own))]))
        series["wins"].append((label, colour, [(at("reference_wins", own), at("text_wins", own))]))
        if set(DIAL) <= set(run.examples):
            series["cpi"].append((label, colour, [(dial, at("copy_paste_index", dial)) for dial in DIAL]))
            series["detail"].append((label, colour, [(dial, at("detail", dial)) for dial in DIAL]))
    conflicts = ", ".join(IN_REFERENCE)
    return [
        ("Copy-paste index (up) against identity R2 (right)", _svg(series["copy"])),
        (
            f"Where prompt and reference disagree ({conflicts}): prompt wins (up), reference wins (right)",
            _svg(series["wins"]),
        ),
        ("Copy-paste index along the strength of the face latent", _svg(series["cpi"])),
        ("Detail along the strength of the face latent", _svg(series["detail"])),
    ]


def _svg(series: Sequence[tuple[str, str, list[tuple[float, float]]]]) -> str:
    """Return points, joined where a series has several, as an SVG drawing with its ranges and a legend."""
    if not series:
        return "<p>not run</p>"
    points = np.array([point for _, _, path in series for point in path])
    low, high = points.min(axis=0), points.max(axis=0)
    room = np.maximum((high - low) * 0.08, 0.01)
    low, high = low - room, high + room

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = (np.array(point) - low) / (high - low)
        return _MARGIN + float(across) * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - float(up) * (_HEIGHT - 2 * _MARGIN)

    marks = []
    for number, (label, colour, path) in enumerate(series):
        places = [place(point) for point in path]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if len(places) > 1:
            marks.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{escape(label)}</title></circle>'
            for x, y in places
        ]
        marks.append(f'<text x="{_WIDTH}" y="{_MARGIN + 15 * number}" style="fill:{colour}">{escape(label)}</text>')
    height = max(_HEIGHT, 2 * _MARGIN + 15 * len(series))
    left, bottom = _MARGIN, _HEIGHT - _MARGIN
    return (
        f'<svg viewBox="0 0 {_WIDTH + 170} {height}" width="{_WIDTH + 170}" role="img">'
        f'<path d="M{left} {_MARGIN}V{bottom}H{_WIDTH - _MARGIN}" fill="none" stroke="currentColor"/>'
        f'<text x="{left}" y="{bottom + 16}">{low[0]:.2f}</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{bottom + 16}" text-anchor="end">{high[0]:.2f}</text>'
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">{low[1]:.2f}</text>'
        f'<text x="{left - 6}" y="{_MARGIN + 8}" text-anchor="end">{high[1]:.2f}</text>{"".join(marks)}</svg>'
    )


def _strength(run: Run) -> float:
    """Return the strength that an arm is shown at: the full one, or its only one."""
    return max(run.examples)


def _own(run: Run) -> NDArray[np.uint8]:
    return run.examples[_strength(run)]


def _cell(name: str, measured: Measured) -> str:
    low, high = measured.interval()
    share = share_of_ceiling(name, measured)
    below = "" if share is None else f"<br><small>{share:.0%}</small>"
    return f"{measured.value:.3f}<br><small>[{low:.3f}, {high:.3f}]</small>{below}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _picture(pixels: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
