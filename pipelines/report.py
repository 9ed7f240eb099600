"""A run's views: the results table, the contact sheet and the one-file HTML report.

All three are pure functions of the run's records and can be made again at any time.
"""

from __future__ import annotations

import base64
import hashlib
import io
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont, ImageOps

from echovideo.video import sample_mp4
from pipelines.outcome import KINDS, Dead, Failed, Ok, Rejected, RowOutcome, kind_of

MAX_EMBEDDED_BYTES = 20_000_000
"""How much base64 text of pictures and videos one report holds; the rest is linked."""
MAX_CARDS = 1000
MAX_SHEET_ROWS = 50
SHEET_FRAMES = 6

_POSTER_SIDE, _THUMBNAIL_SIDE, _JPEG_QUALITY = 320, 112, 65
# What a row's poster and two thumbnails take in base64 at these sizes, kept free for the rows still to come.
_IMAGES_BYTES_PER_ROW = 18_000
_READERS = 4
_INK, _SOFT_INK = (15, 23, 42), (51, 65, 85)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowView:
    """One manifest row as the views show it.

    `photo` and `face` are JPEG or PNG bytes of the given photo and of the aligned face, None where there is none.
    `poster` is a still of the video as `echovideo.video.poster_jpeg` makes it. `read_mp4` fetches the video only when
    a view holds it, so that a report reads no more than it embeds; `href` is where a reader of the report finds the
    video: a relative path or an http(s) address.
    """

    row_id: str
    prompt: str
    outcome: RowOutcome
    photo: bytes | None = field(default=None, repr=False)
    face: bytes | None = field(default=None, repr=False)
    poster: bytes | None = field(default=None, repr=False)
    tags: Mapping[str, str] = field(default_factory=dict)
    read_mp4: Callable[[], bytes] | None = None
    href: str | None = None

    def __post_init__(self) -> None:
        assert self.href is None or urlsplit(self.href).scheme in ("", "http", "https", "file"), self.href


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """One run as the report shows it: ISO 8601 times, `notice` and `judged` as its model's card says."""

    run_id: str
    started: str
    finished: str
    model: str
    notice: str
    judged: bool
    licence: str
    rows: tuple[RowView, ...]
    settings: Mapping[str, object] = field(default_factory=dict)


_TEXTS = pa.map_(pa.string(), pa.string())
_FLOATS = pa.map_(pa.string(), pa.float64())


def _column(name: str, kind: pa.DataType, doc: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


RESULTS_SCHEMA = pa.schema(
    [
        _column("row_id", pa.string(), "the manifest row's id", nullable=False),
        _column("outcome", pa.string(), f"one of {', '.join(KINDS)}", nullable=False),
        _column("stage", pa.string(), "where a failed attempt broke"),
        _column("code", pa.string(), "stable reason of a rejected or failed row"),
        _column("message", pa.string(), "the reason in words"),
        _column("numbers", _FLOATS, "the measurements behind a rejection"),
        _column("video_uri", pa.string(), "where the MP4 lies; of a rejected row, the best one kept"),
        _column("sha256", pa.string(), "hex digest of the MP4"),
        _column("num_bytes", pa.int64(), "size of the MP4 in bytes"),
        _column("width", pa.int32(), "pixels"),
        _column("height", pa.int32(), "pixels"),
        _column("num_frames", pa.int32(), "frames"),
        _column("fps", pa.int32(), "frames per second"),
        _column("duration_s", pa.float64(), "playing time in seconds"),
        _column("seed", pa.int64(), "seed of the kept video"),
        _column("seeds_tried", pa.list_(pa.int64()), "all seeds spent on the row, in order"),
        _column("face_similarity", pa.float64(), "mean cosine similarity to the photo; null when not measured"),
        _column("detection_rate", pa.float64(), "share of frames with a face, 0 to 1; null when not measured"),
        _column("attempt", pa.int32(), "number of the attempt that gave this outcome"),
        _column("strikes", pa.int32(), "workers that a dead row took down"),
        _column("reused", pa.bool_(), "an equal video existed and was not rendered again"),
        _column("timings", _FLOATS, "seconds per stage"),
        _column("sidecar_uri", pa.string(), "where the video's metadata lies"),
        _column("tags", _TEXTS, "the manifest row's tags", nullable=False),
    ],
    metadata={"schema": "echovideo.results", "version": "1"},
)
"""Columns of the results table. A new column raises no version; a changed or removed one does."""


def results_table(rows: Iterable[RowView]) -> pa.Table:
    """Return one line per manifest row, in manifest order, in RESULTS_SCHEMA."""
    return pa.Table.from_pylist([_result(row) for row in rows], schema=RESULTS_SCHEMA)


def _result(row: RowView) -> dict[str, Any]:
    outcome = row.outcome
    values = {name: getattr(outcome, name, None) for name in RESULTS_SCHEMA.names}
    video = getattr(outcome, "video", None)
    if video is not None:
        for name in ("sha256", "num_bytes", "width", "height", "num_frames", "fps", "duration_s"):
            values[name] = getattr(video, name)
        values["video_uri"] = video.uri
    for name, mapping in (("numbers", values["numbers"]), ("timings", values["timings"]), ("tags", row.tags)):
        values[name] = None if mapping is None else list(mapping.items())
    return {**values, "row_id": row.row_id, "outcome": kind_of(outcome)}


class Look(NamedTuple):
    """An outcome as people read it: its label, its plural and its colours (RGB) on the contact sheet."""

    label: str
    meaning: str
    ink: tuple[int, int, int]


LOOKS: Mapping[str, Look] = {
    "ok": Look("Finished", "the video is done", (22, 101, 52)),
    "rejected": Look("Refused", "the row asks for what cannot be given; change it and run it again", (146, 64, 14)),
    "failed": Look("Failed", "an attempt broke; the next run tries again by itself", (185, 28, 28)),
    "dead": Look("Given up", "the row took its worker down too often and is not tried again", (107, 33, 168)),
    "cancelled": Look("Cancelled", "the run was stopped first; the next run makes it", (71, 85, 105)),
}


class Advice(NamedTuple):
    """A refusal in plain words: what is wrong, and what to do."""

    what: str
    do: str


_FRONT = "Use a photo taken from the front, with the whole face free."
_PHOTO_ADDRESS = "Check the address in the manifest and that the run may read it."
ADVICE: Mapping[str, Advice] = {
    "no_face": Advice("No face was found in the photo.", _FRONT),
    "several_faces": Advice("The photo shows more than one person.", "Crop it to the one person who is meant."),
    "face_turned": Advice("The face looks too far to the side.", _FRONT),
    "blurred": Advice("The face is not sharp enough.", "Use a sharper photo, best the original file."),
    "too_small": Advice("The photo, or the face in it, is too small.", "Use a larger photo, or one taken closer."),
    "too_large": Advice("The photo is larger than can be read.", "Save it smaller."),
    "photo_too_large": Advice("The photo file is larger than can be read.", "Save it smaller."),
    "not_an_image": Advice("The photo file cannot be opened as a picture.", "Save it again as JPEG or PNG."),
    "photo_unreachable": Advice("The photo could not be fetched.", _PHOTO_ADDRESS),
    "uri_not_allowed": Advice("This run may not read photos from that address.", _PHOTO_ADDRESS),
    "face_similarity": Advice(
        "The face in the video is not close enough to the photo, with every seed that was tried.",
        "Allow more tries, use a clearer photo, or lower the row's face_similarity.",
    ),
    "consent_missing": Advice("The row names no consent.", "Fill in consent_id."),
    "duplicate_row_id": Advice("Several rows have the same id.", "Give each row its own row_id."),
    "invalid_row_id": Advice("The row's id is missing or has characters that are not allowed.", "Change row_id."),
    "invalid_prompt": Advice("The prompt is missing, empty or too long.", "Say in a few sentences what happens."),
    "invalid_size": Advice("The video size cannot be made.", "Use one of the published sizes."),
    "invalid_num_frames": Advice("The length cannot be made.", "Use a length the model knows, up to 49 frames."),
    "tier_unavailable": Advice("The quality tier is not to be had on these machines.", "Choose another tier."),
}
"""Refusals that people meet, by outcome code; any other code is shown with its own message."""


def contact_sheet(rows: Sequence[RowView], *, width: int = 1600) -> Image.Image:
    """Return one RGB picture, `width` pixels wide: a line per row with its face, its words and six of its frames.

    A row without a video has its reason in place of the frames. Only the first MAX_SHEET_ROWS rows are drawn; the last
    line says how many are not.
    """
    sheet = _Sheet.of_width(width)
    with ThreadPoolExecutor(_READERS) as readers:
        lines = list(readers.map(lambda row: _sheet_line(row, sheet), rows[:MAX_SHEET_ROWS]))
    if len(rows) > MAX_SHEET_ROWS:
        lines.append(_sheet_note(f"{len(rows) - MAX_SHEET_ROWS} more rows are not shown", sheet))
    if not rows:
        lines.append(_sheet_note("no row has ended", sheet))
    picture = Image.new("RGB", (width, sum(line.height for line in lines)), "white")
    top = 0
    for line in lines:
        picture.paste(line, (0, top))
        top += line.height
    return picture


class _Sheet(NamedTuple):
    """Measures of a contact sheet in pixels, and its fonts."""

    width: int
    gap: int
    face: int
    text: int
    frame: int
    size: int
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    heading: ImageFont.FreeTypeFont | ImageFont.ImageFont

    @classmethod
    def of_width(cls, width: int) -> _Sheet:
        gap, face, text, size = width // 130, width // 14, width // 5, max(11, width // 110)
        frame = (width - face - text - 4 * gap) // SHEET_FRAMES - gap // 3
        heading = ImageFont.load_default(size + 2)
        return cls(width, gap, face, text, frame, size, ImageFont.load_default(size), heading)


def _sheet_line(row: RowView, sheet: _Sheet) -> Image.Image:
    gap, size, font = sheet.gap, sheet.size, sheet.font
    frames = () if row.read_mp4 is None else sample_mp4(row.read_mp4(), SHEET_FRAMES)
    pictures = [_fit(Image.fromarray(frame), sheet.frame, sheet.frame * 3 // 4) for frame in frames]
    height = max([sheet.face, *(picture.height for picture in pictures)])
    line = Image.new("RGB", (sheet.width, height + 2 * gap), "white")
    draw = ImageDraw.Draw(line)
    # A refused photo has no face to show, and is what one looks for.
    reference = row.face or row.photo
    if reference is not None:
        line.paste(_fit(_open(reference), sheet.face, height), (gap, gap))

    left = 2 * gap + sheet.face
    look = LOOKS[kind_of(row.outcome)]
    draw.text((left, gap), row.row_id[:40], fill=_INK, font=sheet.heading)
    badge = draw.textbbox((left + 6, gap + size * 1.9), look.label, font=font)
    draw.rounded_rectangle((badge[0] - 6, badge[1] - 4, badge[2] + 6, badge[3] + 4), 6, fill=look.ink)
    draw.text((left + 6, gap + size * 1.9), look.label, fill="white", font=font)
    room = int((height - size * 3.6) // (size * 1.3))
    prompt = _cut(_wrap(row.prompt, sheet.text, font), room)
    draw.multiline_text((left, gap + size * 3.6), prompt, fill=_SOFT_INK, font=font, spacing=size * 0.2)

    left += sheet.text + gap
    for position, picture in enumerate(pictures):
        line.paste(picture, (left + position * (sheet.frame + gap // 3), gap))
    if not pictures:
        reason = _cut(_wrap(getattr(row.outcome, "message", look.meaning), sheet.text * 2, font), 4)
        draw.multiline_text((left, gap), reason, fill=look.ink, font=font, spacing=size * 0.2)
    draw.line((gap, line.height - 1, sheet.width - gap, line.height - 1), fill=(226, 232, 240))
    return line


def _sheet_note(text: str, sheet: _Sheet) -> Image.Image:
    line = Image.new("RGB", (sheet.width, 3 * sheet.size), "white")
    ImageDraw.Draw(line).text((sheet.gap, sheet.size), text, fill=_SOFT_INK, font=sheet.heading)
    return line


def _cut(lines: Sequence[str], room: int) -> str:
    return "\n".join(lines if len(lines) <= room else [*lines[: room - 1], lines[room - 1] + " ..."])


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getbbox(longer)[2] <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _open(content: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    return ImageOps.contain(image, (width, height))


def render_report(view: RunView) -> str:
    """Return the run as one HTML page that needs nothing else: no request, no script.

    Pictures and videos are embedded up to MAX_EMBEDDED_BYTES, later videos are linked; of more than MAX_CARDS rows,
    those without a video come first and the page says how many are not shown.
    """
    counts = Counter(kind_of(row.outcome) for row in view.rows)
    shown = _shown(view.rows)
    started, finished = datetime.fromisoformat(view.started), datetime.fromisoformat(view.finished)
    return render_page(
        "report.html.j2",
        run=view,
        started=f"{started:%d %B %Y, %H:%M}",
        finished=f"{finished:%d %B %Y, %H:%M %Z}" if finished.date() != started.date() else f"{finished:%H:%M %Z}",
        figures=_figures(view.rows, (finished - started).total_seconds()),
        counts=[(kind, look, counts[kind]) for kind, look in LOOKS.items() if counts[kind]],
        bar=_bar(counts),
        stages=_stages(view.rows),
        cards=_cards(shown),
        num_hidden=len(view.rows) - len(shown),
    )


def render_page(template: str, **values: Any) -> str:
    """Return the page of a file of `templates/`, styled as all reports are."""
    folder = files("pipelines") / "templates"
    css = (folder / "report.css").read_text()
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        (folder / template).read_text()
    )
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return page.render(css=Markup(css), css_digest=digest, **values)


def _shown(rows: Sequence[RowView]) -> Sequence[RowView]:
    if len(rows) <= MAX_CARDS:
        return rows
    return sorted(rows, key=lambda row: isinstance(row.outcome, Ok))[:MAX_CARDS]


def _bar(counts: Counter[str]) -> list[tuple[str, float, float]]:
    """(outcome, left, width) of each part of the bar, in percent of all rows."""
    parts, left = [], 0.0
    for kind in LOOKS:
        if counts[kind]:
            width = 100 * counts[kind] / counts.total()
            parts.append((kind, left, width))
            left += width
    return parts


def _figures(rows: Sequence[RowView], elapsed_s: float) -> list[tuple[str, str]]:
    done = [row.outcome for row in rows if isinstance(row.outcome, Ok)]
    fresh = [outcome for outcome in done if not outcome.reused]
    similarities = [outcome.face_similarity for outcome in done if outcome.face_similarity is not None]
    figures = [
        ("videos finished", f"{len(done)} of {len(rows)}"),
        ("playing time", _duration(sum(outcome.video.duration_s for outcome in done))),
        ("run time", _duration(elapsed_s)),
    ]
    if fresh:
        work_s = sum(sum(outcome.timings.values()) for outcome in fresh) / len(fresh)
        figures.append(("work per new video", _duration(work_s)))
    if len(fresh) < len(done):
        figures.append(("reused from before", str(len(done) - len(fresh))))
    if similarities:
        lowest, median = min(similarities), statistics.median(similarities)
        figures.append((f"median face similarity, lowest {lowest:.2f}", f"{median:.2f}"))
    return figures


# As a video meets them; records keep their keys sorted.
_STAGE_ORDER = ("identity", "condition", "denoise", "decode", "encode", "judge")


class Stage(NamedTuple):
    """Mean seconds a stage took per newly made video, and that as percent of the slowest stage and of all."""

    name: str
    seconds: float
    percent_of_longest: float
    percent_of_all: float


def _stages(rows: Sequence[RowView]) -> list[Stage]:
    fresh = [row.outcome for row in rows if isinstance(row.outcome, Ok) and not row.outcome.reused]
    seen = {name for outcome in fresh for name in outcome.timings}
    names = [name for name in _STAGE_ORDER if name in seen] + sorted(seen - set(_STAGE_ORDER))
    means = {name: sum(outcome.timings.get(name, 0.0) for outcome in fresh) / len(fresh) for name in names}
    longest, total = max(means.values(), default=0.0), sum(means.values())
    return [
        Stage(_words(name), seconds, 100 * seconds / longest, 100 * seconds / total)
        for name, seconds in means.items()
        if seconds > 0
    ]


def _cards(rows: Sequence[RowView]) -> Iterable[dict[str, Any]]:
    """Each row as the template draws it, with its pictures, and its video while there is room for it."""
    spent = 0
    for index, row in enumerate(rows):
        card = _card(row)
        images = {
            "photo": picture_uri(row.photo, _THUMBNAIL_SIDE),
            "face": picture_uri(row.face, _THUMBNAIL_SIDE),
            "poster": picture_uri(row.poster, _POSTER_SIDE),
        }
        size = sum(len(image) for image in images.values() if image is not None)
        if spent + size <= MAX_EMBEDDED_BYTES:
            card.update(images)
            spent += size
        video = card["video"]
        if video is not None and row.read_mp4 is not None:
            size = video.num_bytes * 4 // 3
            if spent + size + _IMAGES_BYTES_PER_ROW * (len(rows) - index - 1) <= MAX_EMBEDDED_BYTES:
                card["mp4"] = _data_uri("video/mp4", row.read_mp4())
                spent += size
        yield card


def _card(row: RowView) -> dict[str, Any]:
    outcome = row.outcome
    card: dict[str, Any] = {
        "row": row,
        "kind": kind_of(outcome),
        "look": LOOKS[kind_of(outcome)],
        "photo": None,
        "face": None,
        "poster": None,
        "mp4": None,
        "video": getattr(outcome, "video", None),
        "facts": _facts(outcome),
        "advice": None,
        "reason": None,
        "stage": None,
        "traceback": None,
    }
    match outcome:
        case Rejected():
            card["advice"] = ADVICE.get(outcome.code)
            card["reason"] = outcome.message
        case Failed():
            card["reason"] = outcome.message
            card["stage"] = _words(outcome.stage)
            card["traceback"] = outcome.traceback
        case Dead():
            card["reason"] = outcome.message
    return card


def _facts(outcome: RowOutcome) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    video = getattr(outcome, "video", None)
    if isinstance(outcome, Ok):
        if outcome.face_similarity is not None:
            facts.append(("face similarity", f"{outcome.face_similarity:.2f}"))
        if outcome.detection_rate is not None:
            facts.append(("face seen in", f"{outcome.detection_rate:.0%} of frames"))
        tried = len(outcome.seeds_tried)
        facts.append(("seed", f"{outcome.seed} (best of {tried})" if tried > 1 else str(outcome.seed)))
    if video is not None:
        facts.append(("video", f"{video.width} x {video.height}, {video.duration_s:.1f} s, {video.fps} fps"))
    match outcome:
        case Ok(reused=True):
            facts.append(("made", "earlier, reused"))
        case Ok():
            facts.append(("made in", _duration(sum(outcome.timings.values()))))
        case Rejected():
            facts += [(_words(name), _number(value)) for name, value in outcome.numbers.items()]
            facts.append(("code", outcome.code))
        case Failed():
            facts += [("attempt", str(outcome.attempt)), ("code", outcome.code)]
        case Dead():
            facts.append(("workers lost", str(outcome.strikes)))
    return facts


def picture_uri(content: bytes | None, max_side: int) -> str | None:
    """Return a picture as a data: address of a JPEG at most `max_side` pixels long; None where there is none."""
    if content is None:
        return None
    with Image.open(io.BytesIO(content)) as image:
        image.thumbnail((max_side, max_side), reducing_gap=2.0)
        buffer = io.BytesIO()
        ImageOps.exif_transpose(image).convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return _data_uri("image/jpeg", buffer.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
