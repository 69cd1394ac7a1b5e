"""The pages for people, at /ui and /docs: files that load nothing from other sites."""

from functools import cache
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

import cascade.offline

HERE = Path(__file__).parent
STYLE = Path(cascade.offline.__path__[0]) / "templates" / "style.css"
"""The reports of batch jobs have the same."""
FILES = {
    "style.css": (STYLE, "text/css"),
    **{
        f"{name}.js": (HERE / f"{name}.js", "text/javascript")
        for name in ("common", "plane", "try", "overview", "inside", "improve")
    },
}
POLICY = (  # pages load nothing from other sites and send nothing to them
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@cache
def page(path: Path) -> str:
    """The text of a file, read once."""
    return path.read_text()


def add(app: FastAPI) -> None:
    """Add the routes."""

    @app.get("/", include_in_schema=False)
    @app.get("/ui", include_in_schema=False)
    async def look() -> Response:
        return HTMLResponse(page(HERE / "ui.html"), headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page(HERE / "docs.html"), headers=HEADERS)

    @app.get("/ui/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404)
        path, kind = FILES[name]
        return Response(page(path), headers=HEADERS, media_type=kind)
