"""Lessons and exercises as a person uses them: JupyterLab in headless Chromium (`pytest -m browser`).

Needs a Chromium on the path; without one the tests are skipped. One lesson is opened, with CLSEG_BROWSER=all every one.
"""

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

import build

playwright = pytest.importorskip("playwright.sync_api")
EVERY = [stem for stem in build.stems() if re.match(r"0[24]_|1\d_", stem)]
LESSONS = EVERY if os.environ.get("CLSEG_BROWSER") == "all" else ["04_infonce"]
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
LESSON_LIMIT_S = 240
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that shows copies of lessons and exercises."""
    folder, home = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("home")
    for stem in [*LESSONS, "91_infonce"]:
        shutil.copy(build.FOLDER / f"{stem}.ipynb", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "work",
    }
    environment = os.environ | {name: str(home / place) for name, place in places.items()}
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=t"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder}"]
    with open(home / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while "http://" not in (home / "log").read_text(encoding="utf-8"):
            assert time.monotonic() < until, (home / "log").read_text(encoding="utf-8")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def opened(browser, lab, stem):
    """A page on which a notebook has been opened and its kernel is idle."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}/{stem}.ipynb?token=t&reset")
    page.wait_for_selector(IDLE, timeout=60_000)
    page.wait_for_timeout(2000)
    yield page
    page.close()


@pytest.mark.parametrize("stem", LESSONS)
def test_a_lesson_runs_and_its_slider_changes_the_picture(browser, lab, stem):
    with opened(browser, lab, stem) as page:
        assert page.locator(".lm-TabBar-tab.jp-mod-dirty").count() == 0, "opened, it has unsaved changes"
        page.click(".lm-MenuBar-item:has-text('Run')")
        page.click(".lm-Menu-item:has-text('Run All Cells') >> nth=0")
        page.wait_for_timeout(2000)
        page.wait_for_selector(IDLE, timeout=LESSON_LIMIT_S * 1000)
        assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
        assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        cell = page.locator(".jp-CodeCell:has(.widget-interact)").first
        cell.scroll_into_view_if_needed()
        picture = cell.locator("img").first
        before = picture.get_attribute("src")
        handle, menu = cell.locator(".noUi-handle"), cell.locator("select")
        if handle.count():
            handle.first.focus()
            page.keyboard.press("ArrowRight")
        else:
            menu.first.select_option(index=0)
        page.wait_for_timeout(3000)
        assert picture.get_attribute("src") != before


def test_an_exercise_tells_a_wrong_answer_what_is_wrong_and_accepts_the_right_one(browser, lab):
    with opened(browser, lab, "91_infonce") as page:
        cells, number = page.locator(".jp-CodeCell"), itertools.count(1)

        def run(place, source=None):
            editor = cells.nth(place).locator(".cm-content")
            editor.click()
            if source:
                page.keyboard.press("Control+A")
                page.keyboard.insert_text(source)
            page.keyboard.press("Control+Enter")
            prompt = cells.nth(place).locator(".jp-InputPrompt")
            playwright.expect(prompt).to_have_text(f"[{next(number)}]:", timeout=60_000)
            page.wait_for_timeout(500)
            return cells.nth(place).locator(".jp-OutputArea").inner_text()

        run(0)
        assert "Your turn: all e^s are equal" in run(1)
        run(1, "answer_1 = log(40)")
        assert "Not yet: an anchor is not compared with itself." in run(2)
        run(1, "answer_1 = log(39)")
        assert "Right: all 39 terms" in run(2)
