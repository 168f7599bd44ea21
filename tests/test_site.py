"""The site: it is built without a warning, needs no server and no network, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import build

PROJECT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    places = ["-d", str(folder / "doctrees"), "-c", "docs", ".", str(folder / "html")]
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *places]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_page_and_notebook_is_there(site):
    pages = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *build.FOLDER.glob("*.ipynb")]
    for page in pages:
        assert (site / page.relative_to(PROJECT)).with_suffix(".html").is_file(), page
    assert (site / "searchindex.js").stat().st_size > 50_000


def test_nothing_is_fetched_and_links_lead_to_files(site):
    found = 0
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        for tag, attribute in (("script", "src"), ("link", "href"), ("img", "src"), ("a", "href")):
            for target in re.findall(rf'<{tag}\b[^>]*?\b{attribute}="([^"]*)"', html):
                if re.match(r"[a-z]+:", target):
                    assert tag == "a" or target.startswith("data:"), f"{page}: fetches {target}"
                elif place := unquote(target.partition("#")[0].partition("?")[0]):
                    assert (page.parent / place).exists(), f"{page}: {target}"
                    found += 1
    assert found > 1000


@pytest.mark.browser
def test_its_search_works_from_the_file_system(site, browser):
    page = browser.new_page()
    page.goto(f"{site.as_uri()}/search.html?q=temperature")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert page.locator("#search-results li a").count() > 3
    with page.expect_navigation():
        page.locator("#search-results li a").first.click()
    assert "temperature" in page.inner_text("body").lower()
    page.close()
