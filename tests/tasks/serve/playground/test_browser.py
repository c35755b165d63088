"""The playground in headless Chromium, on an engine in memory.

Each scenario leaves a screenshot, in the folder that PLAYGROUND_SCREENSHOTS names or in pytest's temporary one.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.playground_site import CHROMIUM, HOSTILE, Site, ask, finish, opened, png, requests_of, serving, tab

from tasks.serve.service.requests import GenerateRequest, SearchRequest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]
PROMPT = "a red heart"
PHONE = {"width": 375, "height": 740}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One server and one browser for all scenarios."""
    with serving(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def page(site: Site) -> Iterator[Any]:
    """An empty page. A script error fails the test."""
    site.engine.gate.set()
    page = site.context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    site.engine.gate.set()
    page.close()
    assert not errors


def test_search_shows_scores_columns_and_sources(site: Site, page: Any) -> None:
    opened(site, page)
    ask(page, PROMPT)
    page.wait_for_selector(".grid .result")
    assert page.locator(".grid .result").count() == 24
    assert page.locator(".score").first.inner_text() == "0.89"
    assert page.locator(".about").first.is_hidden()
    page.locator(".card").nth(1).hover()
    about = page.locator(".about").nth(1)
    assert about.is_visible() and "licence" in about.inner_text()
    link = about.locator("a")
    assert re.match(r"https://images\.example/", link.get_attribute("href"))
    assert "noopener" in link.get_attribute("rel")
    finish(site, page, "search")


def test_threshold_hides_results_without_a_new_search(site: Site, page: Any) -> None:
    opened(site, page, "?tab=search&text=a+red+heart&min_score=0.8")
    page.wait_for_selector(".grid .result")
    assert page.locator(".grid .result").count() == 7
    assert "7 of 24" in page.locator(".threshold").inner_text()
    before = len(requests_of(site, SearchRequest))
    page.get_by_label("Lowest similarity").press("ArrowLeft")
    page.wait_for_url("**min_score=0.79**")
    assert len(requests_of(site, SearchRequest)) == before


def test_search_combines_text_image_and_negative_terms(site: Site, page: Any) -> None:
    opened(site, page)
    page.locator(".uploader input[type=file]").set_input_files(
        {"name": "heart.png", "mimeType": "image/png", "buffer": png()}
    )
    page.wait_for_selector(".chip img")
    page.get_by_label("Without").fill("car, road")
    ask(page, PROMPT)
    page.wait_for_selector(".grid .result")
    request = requests_of(site, SearchRequest)[-1]
    assert (request.text, request.negative, request.image.size) == (PROMPT, ["car", "road"], (48, 48))


def test_pasted_image_is_searched(site: Site, page: Any) -> None:
    opened(site, page)
    page.evaluate(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
        }""",
        list(png("olive")),
    )
    page.wait_for_selector(".chip img")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector(".grid .result")
    asked = requests_of(site, SearchRequest)
    assert asked[-1].image.getpixel((5, 5)) == (128, 128, 0)
    page.reload()
    page.wait_for_selector(".grid .result")
    assert page.locator(".chip img").count() == 1 and len(requests_of(site, SearchRequest)) == len(asked)
    opened(site, page, "?tab=search&text=a+heart&image=expired")
    page.wait_for_selector(".message >> text=the image has expired; add it again")
    assert len(requests_of(site, SearchRequest)) == len(asked)


def test_unreadable_file_is_refused_with_a_message(site: Site, page: Any) -> None:
    opened(site, page)
    page.locator(".uploader input[type=file]").set_input_files(
        {"name": "text.png", "mimeType": "image/png", "buffer": b"not an image"}
    )
    page.wait_for_selector(".message")
    assert "is not a readable image" in page.locator(".message").inner_text()


def test_click_on_a_result_searches_for_more_like_it(site: Site, page: Any) -> None:
    opened(site, page)
    ask(page, PROMPT)
    page.wait_for_selector(".grid .result")
    third = page.locator(".grid .result").nth(2)
    row = int(third.get_attribute("aria-label").split()[-1])
    third.click()
    page.wait_for_selector(f"text=More like stored image {row}")
    page.wait_for_url(f"**row={row}**")
    assert requests_of(site, SearchRequest)[-1].row == row
    finish(site, page, "more-like-this", audit=False)
    page.get_by_role("combobox", name="Database").click()
    page.get_by_role("option", name="fish").click()
    page.wait_for_selector("text=That image belongs to birds, version 1.")
    assert page.locator(".chip").count() == 0


def test_arrow_keys_move_between_results(site: Site, page: Any) -> None:
    opened(site, page)
    ask(page, PROMPT)
    page.wait_for_selector(".grid .result")
    page.locator(".grid .result").first.focus()
    place = "() => [...document.querySelectorAll('.grid .result')].indexOf(document.activeElement)"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(place) == 1
    page.keyboard.press("ArrowDown")
    assert page.evaluate(place) == 7
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(place) == 0


def test_generate_shows_progress_neighbours_and_details(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate&n=3&seed=7&steps=20&guidance=2.5")
    site.engine.gate.clear()
    ask(page, PROMPT)
    page.wait_for_selector(".progress .cancel")
    page.screenshot(path=site.shots / "progress.png")
    site.engine.gate.set()
    page.wait_for_function("/Step \\d+ of 20/.test(document.querySelector('.progress').innerText)")
    page.wait_for_selector(".made .result")
    assert page.locator(".made").count() == 3
    assert page.locator(".made").first.locator(".neighbours img").count() == 3
    assert "Nearest stored: 0." in page.locator(".made").first.inner_text()
    page.get_by_role("spinbutton", name="Seed").fill("99")
    page.locator(".made .result").nth(1).click()
    details = page.locator(".details")
    details.wait_for()
    assert "Seed 8" in details.inner_text() and "guidance" in details.inner_text()
    assert page.get_by_role("spinbutton", name="Seed").input_value() == "99"
    finish(site, page, "generate")
    details.get_by_role("button", name="Use seed").click()
    page.wait_for_url("**seed=8**")
    assert page.get_by_role("spinbutton", name="Seed").input_value() == "8"


def test_use_all_recalls_every_control_of_an_earlier_image(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate&text=a+fish&n=2&seed=5&steps=3&negative=blue")
    page.wait_for_selector(".made .result")
    ask(page, "another prompt")
    page.wait_for_function("document.querySelectorAll('.history-entry').length === 2")
    page.get_by_role("spinbutton", name="Seed").fill("1")
    page.locator(".history-entry").last.click()
    page.wait_for_url("**text=a+fish**")
    page.locator(".made .result").first.click()
    page.get_by_role("textbox", name="Prompt").fill("a third prompt")
    page.locator(".details").get_by_role("button", name="Use all").click()
    page.wait_for_selector("text=The controls have the values of this image.")
    page.wait_for_function("document.querySelector('.prompt-text textarea').value === 'a fish'")
    assert page.get_by_role("textbox", name="Prompt").input_value() == "a fish"
    assert page.get_by_role("spinbutton", name="Seed").input_value() == "5"
    assert page.get_by_label("Without").input_value() == "blue"


def test_download_is_the_png_of_the_engine(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate&text=a+fish&n=1&seed=5")
    page.locator(".made .result").click()
    with page.expect_download() as saved:
        page.get_by_role("link", name="Download PNG").click()
    job = next(job for job in reversed(site.engine.submitted) if isinstance(job.request, GenerateRequest))
    assert Path(saved.value.path()).read_bytes() == job.future.result().images[0].png
    assert saved.value.suggested_filename == "knn-diffusion-generate-5.png"


def test_interpolation_is_shown_as_a_strip(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate&text=a+cat&interpolate_to=a+dog&n=5&seed=1")
    page.wait_for_selector(".strip .result")
    before = len(requests_of(site, GenerateRequest))
    page.get_by_text("More options").click()
    candidates = page.get_by_role("spinbutton", name="Candidates")
    assert candidates.get_attribute("placeholder") == "2"
    page.get_by_role("combobox", name="Quality").click()
    page.get_by_role("option", name="Best").click()
    page.wait_for_function("[...document.querySelectorAll('.more input')].some((one) => one.placeholder === '8')")
    candidates.fill("99")
    candidates.press("Enter")
    page.wait_for_selector("text=Candidates is not valid: 99; give a whole number from 1 to 16.")
    assert len(requests_of(site, GenerateRequest)) == before
    candidates.fill("")
    page.get_by_label("Interpolate to").press("Enter")
    page.wait_for_url("**quality=best**")
    page.wait_for_function("document.querySelectorAll('.history-entry').length === 2")
    assert requests_of(site, GenerateRequest)[-1].quality == "best"
    assert page.locator(".strip .result").count() == 5
    assert "From “a cat” to “a dog”" in page.locator(".results-head").filter(visible=True).inner_text()
    finish(site, page, "interpolation", audit=False)


def test_escape_cancels_a_job(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate")
    site.engine.gate.clear()
    ask(page, PROMPT)
    page.wait_for_selector(".progress .cancel")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Cancelled.")
    assert site.engine.submitted[-1].status().state == "cancelled"


def test_compare_runs_one_seed_in_every_database(site: Site, page: Any) -> None:
    opened(site, page, "?tab=compare&databases=birds&databases=fish&databases=flowers&n=3&seed=11")
    ask(page, PROMPT)
    page.wait_for_selector(".side .result")
    assert page.locator(".side h2").all_inner_texts() == ["birds, version 1", "fish, version 1", "flowers, version 1"]
    asked = requests_of(site, GenerateRequest)[-3:]
    assert {(one.prompt, one.seed) for one in asked} == {(PROMPT, 11)}
    assert [one.database for one in asked] == ["birds", "fish", "flowers"]
    finish(site, page, "compare")
    site.engine.broken = frozenset({"fish"})
    try:
        ask(page, "another prompt")
        page.wait_for_selector(".side .message >> text=database fish cannot answer")
    finally:
        site.engine.broken = frozenset()
    assert page.locator(".side h2").all_inner_texts() == ["birds, version 1", "fish", "flowers, version 1"]


def test_edit_has_a_slider_an_outline_and_candidates(site: Site, page: Any) -> None:
    opened(site, page, "?tab=edit&n=3&seed=4")
    ask(page, "with sunglasses")
    page.wait_for_selector("text=Add an image to edit")
    page.locator(".uploader input[type=file]").set_input_files(
        {"name": "face.png", "mimeType": "image/png", "buffer": png("gold")}
    )
    page.wait_for_selector(".chip img")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.wait_for_selector(".before-after")
    assert page.locator(".candidates .result").count() == 3
    assert page.locator(".outline polygon").first.get_attribute("points").startswith("25.00,25.00")
    page.get_by_label("Before and after").fill("30")
    assert page.locator(".before-after").evaluate("(one) => one.style.getPropertyValue('--split')") == "30%"
    page.get_by_role("button", name="Candidate 2").click()
    page.wait_for_selector(".edit-stage >> text=Seed 5")
    finish(site, page, "edit")


def test_swap_while_generating_keeps_the_version_of_the_job(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate&n=1")
    site.engine.gate.clear()
    ask(page, PROMPT)
    page.wait_for_selector(".progress .cancel")
    tab(page, "Databases")
    page.get_by_role("button", name="Swap birds").click()
    page.wait_for_selector("text=Serve version 2 of birds?")
    page.wait_for_timeout(300)
    page.screenshot(path=site.shots / "swap-confirmation.png")
    page.get_by_role("button", name="Swap", exact=True).click()
    page.wait_for_selector(".database:has-text('birds') >> text=serving version 2")
    finish(site, page, "swap-while-generating")
    site.engine.gate.set()
    tab(page, "Generate")
    page.wait_for_selector("text=Generated with birds, version 1")
    ask(page, PROMPT)
    page.wait_for_selector("text=Generated with birds, version 2")
    site.engine.swap("birds", 1)


def test_database_that_is_served_later_can_be_chosen(site: Site, page: Any) -> None:
    before = len(requests_of(site, SearchRequest))
    opened(site, page, "?tab=search&text=a&database=trees")
    page.wait_for_selector("text=The link names a database that is not served: trees.")
    assert len(requests_of(site, SearchRequest)) == before
    site.engine.swap("trees", 1)
    try:
        tab(page, "Generate")
        page.get_by_role("combobox", name="Database").click()
        page.get_by_role("option", name="trees").click()
        page.wait_for_url("**database=trees**")
    finally:
        del site.engine._served["trees"]


def test_overload_is_shown_with_the_time_to_wait(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate")
    site.engine.gate.clear()
    waiting = [site.engine.submit(GenerateRequest(prompt="x"))]
    while waiting[0].status().state != "running":
        time.sleep(0.005)
    waiting += [site.engine.submit(GenerateRequest(prompt="x")) for _ in range(4)]
    ask(page, PROMPT)
    page.wait_for_selector(".message")
    assert page.locator(".message").inner_text() == "The service is busy. Try again in 3 s."
    finish(site, page, "overload")
    for job in waiting:
        job.cancel()


def test_place_in_the_queue_is_shown(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate")
    site.engine.gate.clear()
    first = site.engine.submit(GenerateRequest(prompt="x"))
    while first.status().state != "running":
        time.sleep(0.005)
    site.engine.submit(GenerateRequest(prompt="x"))
    ask(page, PROMPT)
    page.wait_for_selector("text=Waiting: 1 in the queue before it")
    site.engine.gate.set()
    page.wait_for_selector(".made .result")


def test_error_of_the_engine_is_shown_without_details(site: Site, page: Any) -> None:
    opened(site, page)
    site.engine.fault = RuntimeError("secret /etc/passwd")
    try:
        ask(page, PROMPT)
        page.wait_for_selector(".message")
    finally:
        site.engine.fault = None
    assert page.locator(".message").inner_text() == "The request failed. The log of the service has the reason."


def test_hostile_caption_and_file_name_stay_text(site: Site, page: Any) -> None:
    opened(site, page)
    name = "<img src=x onerror=document.title='hacked'>.png"
    page.locator(".uploader input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": png()})
    page.wait_for_selector(".chip img")
    assert name[:30] in page.locator(".chip").inner_text()
    ask(page, "hostile")
    page.wait_for_selector(".grid .result")
    page.locator(".card").first.hover()
    about = page.locator(".about").first
    assert HOSTILE in about.inner_text() and "{{ 1 }}" in about.inner_text()
    assert about.locator("a, img, script").count() == 0
    finish(site, page, "hostile", audit=False)
    assert page.title() == "knn-diffusion"


def test_url_reproduces_the_page(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate&n=2&steps=4&start=noise")
    ask(page, PROMPT)
    page.wait_for_selector(".made .result")
    caption = page.locator(".made .caption").first.inner_text()
    link = page.url
    other = site.context.new_page()
    other.goto(link)
    other.wait_for_selector(".made .result")
    assert other.locator(".made .caption").first.inner_text() == caption
    assert other.get_by_label("Prompt").input_value() == PROMPT
    tab(other, "Search")
    other.wait_for_url("**tab=search**")
    tab(other, "Generate")
    other.wait_for_url(link)
    other.go_back()
    other.wait_for_selector('[role=tab][aria-selected=true]:has-text("Search")')
    first, second = requests_of(site, GenerateRequest)[-2:]
    assert first == second and first.start == "noise"
    other.close()


def test_history_survives_a_reload(site: Site, page: Any) -> None:
    opened(site, page)
    ask(page, PROMPT)
    page.wait_for_selector(".history-entry")
    before = len(requests_of(site, SearchRequest))
    page.goto(f"{site.address}/?tab=generate&n=2&steps=4")
    prompt = page.get_by_role("textbox", name="Prompt")
    prompt.fill("typed")
    page.locator(".history-entry").click()
    page.wait_for_selector(".grid .result")
    assert prompt.input_value() == PROMPT
    assert len(requests_of(site, SearchRequest)) == before
    tab(page, "Generate")
    assert page.get_by_role("spinbutton", name="Images").input_value() == "2"
    page.go_back()
    page.wait_for_selector(".grid .result")
    page.go_back()
    page.wait_for_url("**draft=1")
    page.wait_for_function("document.querySelector('.prompt-text textarea')?.value === 'typed'")
    assert len(requests_of(site, SearchRequest)) == before


@pytest.fixture
def phone(site: Site) -> Iterator[Any]:
    """An empty page on a touch screen."""
    context = site.context.browser.new_context(viewport=PHONE, reduced_motion="reduce", has_touch=True, is_mobile=True)
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()


def test_phone_shows_columns_and_has_no_horizontal_scrolling(site: Site, phone: Any) -> None:
    page = phone
    opened(site, page)
    ask(page, PROMPT)
    page.wait_for_selector(".grid .result")
    about = page.locator(".about").first
    assert about.is_visible() and "licence" in about.inner_text() and about.locator("a").is_visible()
    finish(site, page, "phone-search", audit=False)
    for name in ("Generate", "Compare"):
        tab(page, name)
        page.get_by_role("button", name=name, exact=True).click()
        page.wait_for_selector(".made .result" if name == "Generate" else ".side .result")
        finish(site, page, f"phone-{name.lower()}", audit=name == "Generate")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    tab(page, "Databases")
    page.wait_for_selector(".database")
    finish(site, page, "phone-databases")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_dark_mode_is_kept_and_readable(site: Site, page: Any) -> None:
    opened(site, page, "?tab=generate&text=a+fish&n=3&seed=2")
    page.wait_for_selector(".made .result")
    page.get_by_label("Dark or light").click()
    page.wait_for_selector("body.body--dark")
    page.locator(".made .result").first.click()
    page.wait_for_selector(".details")
    finish(site, page, "dark")
    page.reload()
    page.wait_for_selector("body.body--dark")
    page.context.clear_cookies()


def test_no_scenario_contacts_another_host(site: Site, page: Any) -> None:
    opened(site, page, "?tab=search&text=fish")
    page.wait_for_selector(".grid .result")
    remote = [url for url in site.requested if urlsplit(url).scheme not in ("data", "blob")]
    assert len(remote) > 10
    assert {urlsplit(url).hostname for url in remote} == {"127.0.0.1"}
    assert any(url.startswith("ws://") for url in remote)
