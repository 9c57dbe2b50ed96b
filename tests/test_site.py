"""The site builds without a warning, its links and anchors lead somewhere, its reference is complete, and no page is cut in a browser."""

import html
import html.parser
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import batchnorm

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODULES = Path(os.environ.get("BROWSER_MODULES", ROOT / "build" / "browser")) / "node_modules"
PLACE = re.compile(r"https://[\w.-]+(/[^\s]*)?$")


class Page(html.parser.HTMLParser):
    """The targets of a page's links and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.anchors = list[str](), set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}


def broken(site: Path) -> list[str]:
    """Every link and source of a site's pages that leads nowhere; addresses of other hosts are checked for their form."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                fits = PLACE.match(link) is not None
            elif parts.scheme:
                fits = parts.scheme in ("data", "mailto", "javascript")
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                anchors = pages[target].anchors if target in pages else {""}
                fits = target.is_file() and (not parts.fragment or unquote(parts.fragment) in anchors)
            if not fits:
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def built(folder: Path, language: str = "") -> Path:
    """The site, or one language of it, which takes half of the time."""
    pytest.importorskip("material", reason="the site needs the extra docs: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **({"SITE_LANGUAGE": language} if language else {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_links_lead_somewhere_and_the_reference_has_every_public_name(tmp_path):
    site = built(tmp_path, "en")
    assert broken(site) == []
    pages = list((site / "reference").glob("*.html"))
    text = "".join(html.unescape(re.sub(r"<[^>]*>", "", path.read_text())) for path in pages)
    for name in batchnorm.__all__:
        if inspect.ismodule(value := getattr(batchnorm, name)):
            assert any(f'id="batchnorm.{name}"' in path.read_text() for path in pages), name
        elif callable(value) and name != "BatchNormError":
            assert re.search(rf"^{name}\(", text, re.MULTILINE), f"{name} has no signature"
        else:
            assert name in text
    assert "convert(\n    model: Module,\n" in text
    assert "(N, C, L)" in text  # shapes


def test_the_chinese_site_has_the_chinese_chapters_and_an_index_of_their_words(tmp_path):
    site = built(tmp_path, "zh")
    assert broken(site) == []
    for chapter in (ROOT / "docs" / "zh").iterdir():
        title = chapter.read_text().partition("\n")[0].removeprefix("# ")
        page = (site / "tutorial" / chapter.name).with_suffix(".html").read_text()
        assert re.search(rf"<h1[^>]*>{re.escape(html.escape(title, quote=False))}<", page), chapter.name
        assert 'href="00-start.html"' in page  # in the navigation
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert any("滑动\u200b统计" in entry["text"] for entry in entries)


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path):
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2>')
    (tmp_path / "index.html").write_text(
        '<a href="other.html#there">fine</a> <a href="#here" id="here">fine</a> <a href="https://example.org/a">fine</a>'
        '<a href="other.html#gone">1</a> <a href="gone.html">2</a> <img src="gone.png"> <a href="https:/example.org">4</a>'
    )
    found = ["other.html#gone", "gone.html", "gone.png", "https:/example.org"]
    assert broken(tmp_path) == [f"index.html: {link}" for link in found]


def site_check(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`scripts/site_check.mjs` on a folder of pages."""
    if CHROMIUM is None or shutil.which("node") is None:
        pytest.skip("the browser checks need Chromium and node on the PATH")
    if not (MODULES / "axe-core").exists():
        pytest.skip(
            "the browser checks need playwright-core and axe-core: make site-check installs them into build/browser"
        )
    return subprocess.run(
        ["node", str(ROOT / "scripts" / "site_check.mjs"), str(folder), *arguments],
        env={**os.environ, "CHROMIUM": CHROMIUM, "BROWSER_MODULES": str(MODULES.parent)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_no_page_of_either_language_is_cut_in_a_browser_or_complains(tmp_path):
    site = built(tmp_path)
    assert broken(site) == []
    english = {path.relative_to(site) for path in site.rglob("*.html")} - {Path("404.html")}
    chinese = {path.relative_to(site / "zh") for path in (site / "zh").rglob("*.html")}
    assert chinese == {path for path in english if path.parts[0] != "zh"}
    done = site_check(site)
    assert done.returncode == 0, done.stdout + done.stderr


def test_faults_are_found_in_a_browser(tmp_path):
    (tmp_path / "bad.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>bad</title><article><div style="overflow: auto"><table><tr><td>'
        f"{'wide' * 400}</td></tr></table></div><p style='width: 3000px'>wide</p><img src='gone.png'></article>"
        '<script>console.log("hello"); fetch("https://example.invalid/")</script>'
    )
    done = site_check(tmp_path, "--only", "bad.html", "--axe", "bad.html")
    assert done.returncode == 1, done.stdout + done.stderr
    for fault in (
        "px wide in a window",
        "a table is cut",
        "console: hello",
        "asks for https://example.invalid/",
        "image-alt",
    ):
        assert fault in done.stdout
