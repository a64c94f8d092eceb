# SPDX-License-Identifier: Apache-2.0
"""The live page of a server, at `/` of its control socket: the files in `static/`, as they are.

Nothing is built, and nothing comes from another address. The files say nothing of this server, so they need no token; what the page
shows it asks for like any other client (`/v1/figures`, `/v1/map`, `/v1/events`), and for that it needs one where there is one.

A browser is a client that others may send here: any page that a person looks at may have the browser send requests to an address of this machine. So
`refuse_other_sites` refuses what a browser says comes from another site (`Sec-Fetch-Site`, `Origin`), and, where no token is asked for, what a
browser sends to a name that is not this machine's: the name may be another site's that it has let point here (DNS rebinding).
"""

import ipaddress
from importlib.resources import files
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

__all__ = ["add_page", "is_page", "why_refused"]

# Only our own scripts, styles and requests. A browser that meets anything else does not load it.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_FILES: Final = (
    "app.js",
    "charts.js",
    "map.js",
    "model.js",
    "server.js",
    "style.css",
    "vendor/uplot.js",
    "vendor/uplot.css",
)


def add_page(app: web.Application) -> None:
    """Serve the page and its files."""
    app.router.add_get("/", _file("index.html"))
    for name in _FILES:
        app.router.add_get(f"/page/{name}", _file(name))


def is_page(path: str) -> bool:
    """Whether this is one of the files of the page."""
    return path == "/" or path.removeprefix("/page/") in _FILES


def _file(name: str) -> Handler:
    body = files("nbdtarget.control").joinpath("static", name).read_bytes()
    kind = _TYPES[name[name.rindex(".") :]]

    async def answer(_: web.Request) -> web.Response:
        return web.Response(
            body=body, content_type=kind, charset="utf-8", headers=HEADERS
        )

    return answer


def why_refused(request: web.BaseRequest, *, has_token: bool) -> str | None:
    """Return why a browser must not be answered; None: it may, or it is no browser."""
    headers = request.headers
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return "this request comes from another site"
    origin = headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        return f"this request comes from another site: {origin}"
    is_browser = origin is not None or headers.get("User-Agent", "").startswith(
        "Mozilla/"
    )
    if is_browser and not has_token and not _is_this_machine(request.host):
        return f"{request.host} is not localhost: without a token, browsers are answered only at localhost or an IP address"
    return None


def _is_this_machine(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
