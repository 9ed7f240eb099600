"""The page of people: one document and its files. All that it shows it asks of the HTTP interface, with a session.

The document is the same for everybody: a browser that comes from another site sends no Strict cookie with its first
request, so only the page's own requests can tell whether it is signed in.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import get_args

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from echovideo.request import Tier
from pipelines.report import ADVICE
from pipelines.serving.api.problems import not_found
from pipelines.serving.api.service import ServiceHere

router = APIRouter(include_in_schema=False)

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_SIGN_IN_POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_FOLDER = Path(str(files("pipelines").joinpath("serving/page")))
# The report and the page are siblings: what they share of their looks is the report's.
_FILES = {
    "report.css": Path(str(files("pipelines").joinpath("templates/report.css"))),
    **{path.name: path for path in _FOLDER.iterdir() if path.suffix in (".css", ".js")},
}
_TEMPLATES = Environment(
    loader=PackageLoader("pipelines", "serving/page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@router.get("/", response_class=HTMLResponse)
async def show_page(service: ServiceHere) -> HTMLResponse:
    """Return the page's document."""
    document = _TEMPLATES.get_template("page.html.j2").render(
        card=service.config.card, tiers=get_args(Tier), advice=ADVICE
    )
    return HTMLResponse(document, headers={"Content-Security-Policy": _POLICY})


@router.get("/page/{name}", response_class=FileResponse)
async def download_page_file(name: str) -> Response:
    """Return a script or a style sheet of the page."""
    if name not in _FILES:
        raise not_found(f"file {name[:200]}")
    return FileResponse(_FILES[name], headers={"Cache-Control": "no-cache"})


def sign_in_page(token: str | None) -> HTMLResponse:
    """Return the document with the button that uses a link up, or 401 where `token` is None: the link was no good."""
    document = _TEMPLATES.get_template("sign_in.html.j2").render(token=token)
    return HTMLResponse(document, 401 if token is None else 200, headers={"Content-Security-Policy": _SIGN_IN_POLICY})
