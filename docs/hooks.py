"""What `make docs` does besides: pages from the rest of the repository, and a look at the result.

Pages name files as they lie in the repository, so that links work where it is read as such. Here
those to what the site has under another name are turned there, and a built page that would load a
script, a style, a font or a picture from elsewhere ends the build.
"""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "benchmarks/RESULTS.md": "results.md",
}
"""Files of the repository that are pages of the site; the first page stands for the README."""
FINDINGS = "benchmarks/results"
"""Its texts are pages of the site, its pictures are in it."""
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
CSS_LOADS = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")
LOADS = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "input": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "track": "src",
    "video": "src",
}
"""The attribute by which an element loads something by itself."""
POINTS_ONLY = {"canonical", "next", "prev", "alternate", "author", "license"}
"""What a ``link`` element is for that loads nothing."""


def site_path(path: str) -> str | None:
    """Where a file of the repository is in the site; ``None`` where it is not."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    inside = path.removeprefix(f"{FINDINGS}/")
    if inside != path and (inside.endswith(".png") or re.fullmatch(r"[^/]+\.md", inside)):
        return f"results/{inside}"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def pages_from_elsewhere() -> dict[str, str]:
    """Pages of the site whose files are not in ``docs``: by file, each as the site names it."""
    found = [file.relative_to(ROOT).as_posix() for file in sorted((ROOT / FINDINGS).glob("*.md"))]
    return {**ELSEWHERE, **{path: str(site_path(path)) for path in found}}


def with_site_links(markdown: str, path: str, page: str) -> str:
    """A page's text, its links as the site has them.

    Args:
        markdown: The text.
        path: Of its file in the repository.
        page: Of its file in the site.
    """

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        there = site_path(target)
        if there is None:
            return found[0]
        return f"{found[1]}{posixpath.relpath(there, posixpath.dirname(page) or '.')}{found[3]}"

    return LINK.sub(moved, markdown)


class _Loads(HTMLParser):
    """Collects what a page loads by itself from another place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        points = tag == "link" and set(values.get("rel", "").split()) <= POINTS_ONLY
        targets = [] if points else [values.get(LOADS.get(tag, ""), "")]
        targets += [part.split()[0] for part in values.get("srcset", "").split(",") if part.split()]
        self.found += [target for target in targets if re.match(r"(https?:)?//", target)]
        self.found += CSS_LOADS.findall(values.get("style", ""))
        if "mermaid" in values.get("class", "").split():
            self.found.append("a mermaid diagram, whose script comes from elsewhere")

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.found += CSS_LOADS.findall(data)


def loads_of_html(text: str) -> list[str]:
    """What a page would load from another place by itself; links that are clicked are not."""
    reader = _Loads()
    reader.feed(text)
    return reader.found


def loads_of_site(folder: Path) -> list[str]:
    """What the pages and styles of a built site would load from elsewhere, each with its file."""
    found = [
        f"{file.relative_to(folder)}: {target}"
        for file in sorted(folder.rglob("*.html"))
        for target in loads_of_html(file.read_text())
    ]
    return found + [
        f"{file.relative_to(folder)}: {target}"
        for file in sorted(folder.rglob("*.css"))
        for target in CSS_LOADS.findall(file.read_text())
    ]


# --- what mkdocs calls --------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, page in pages_from_elsewhere().items():
        if page != "index.md":
            text = with_site_links((ROOT / path).read_text(), path, page)
            files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / FINDINGS).rglob("*.png")):
        page = site_path(picture.relative_to(ROOT).as_posix())
        files.append(File.generated(config, page, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.generated_by is not None:
        return markdown
    return with_site_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    return re.sub(r"<th( [^>]*)?></th>", r"<td\1></td>", html)  # an empty cell heads nothing


def on_post_page(output: str, **_: Any) -> str:
    return output.replace('role="dialog">', 'role="dialog" aria-label="Search">')


def on_post_build(config: Any) -> None:
    from mkdocs.exceptions import PluginError

    found = loads_of_site(Path(config["site_dir"]))
    if found:
        raise PluginError("pages would load from elsewhere: " + "; ".join(found[:10]))
