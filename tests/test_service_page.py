"""The page in a real Chromium: what people do with it, and that no text of a store does anything to it."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from logitstore.service.page_files import FOLDER
from logitstore.service.tokens import new_token
from tests.page_world import HOSTILE, Guesser, Watched, chromium, page_store, page_tokens
from tests.served import serving

TEACHER = '<img src=x onerror="window.harmed = 1">\u202e'
VIEWS = {
    "stores": "#/",
    "store": "#/first?sort=nll&descending=true",
    "document": "#/first/2?t=100",
    "comparison": "#/first/2/compare/second?t=100",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("stores")
    page_store(folder / "first.zarr", "threshold:8", teacher=TEACHER, temperatures=(1.0, 2.0))
    page_store(folder / "second.zarr", "top-k:6", seed=1)
    page_store(folder / "drawn.zarr", "random:9", seed=2)
    with serving(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def watched(browser: Any, base: str) -> Iterator[Watched]:
    """A page that must not complain, ask anybody else or be harmed."""
    found = Watched(browser, base)
    yield found
    assert found.complaints == [] and found.foreign() == []
    assert found.page.evaluate("window.harmed") is None
    found.context.close()


def test_from_the_list_of_stores_to_the_candidates_of_a_token_and_a_comparison(watched: Watched) -> None:
    page = watched.open("")
    assert page.locator(".cards h2").all_inner_texts() == ["drawn", "first", "second"]
    page.get_by_role("link", name="first", exact=True).click()
    page.get_by_label("Sort by").select_option("length")
    page.get_by_label("Order").select_option("true")
    page.get_by_role("button", name="Show").click()
    page.locator('th[aria-sort="descending"]', has_text="tokens").wait_for()
    page.locator(".documents tbody a").first.click()
    text = page.get_by_role("group", name="Text of document 2")
    text.focus()
    page.keyboard.press("End")
    page.get_by_role("heading", name="Position 298").wait_for()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("heading", name="Position 297").wait_for()
    assert page.locator(".candidate").count() >= 8 and page.locator(".tag").inner_text() == "what followed"
    page.wait_for_url(re.compile(r"/[0-9a-f]{32}\?t=297$"))
    page.get_by_label("Compare with").select_option("second")
    page.get_by_role("button", name="Compare").click()
    page.locator("table.both").wait_for()
    assert page.locator("table.both thead").inner_text().split() == ["token", "first", "second"]
    assert "Position 297" in page.locator(".panel h2").inner_text()


def test_the_address_that_runs_are_given_shows_the_store(watched: Watched, base: str) -> None:
    page = watched.open("first")
    page.get_by_role("heading", name="first", exact=True).wait_for()
    assert page.url == f"{base}/#/first"
    assert httpx2.get(f"{base}/first").status_code == 404
    assert httpx2.get(f"{base}/%2e%2e%22x", headers={"Accept": "text/html"}).headers["location"] == "./#/..%22x"


def test_arrow_keys_go_along_and_across_lines_and_are_told_to_a_screen_reader(watched: Watched) -> None:
    page = watched.open("#/first/2?t=100")
    at = lambda: int(page.locator(".panel h2").inner_text().split()[1])  # noqa: E731
    page.locator(".text").focus()
    for key, moved in (("ArrowRight", {101}), ("ArrowDown", range(102, 130)), ("Home", {0}), ("ArrowLeft", {0})):
        page.keyboard.press(key)
        assert at() in moved, key
    page.keyboard.press("PageDown")
    there = at()
    page.keyboard.press("ArrowUp")
    assert there == 50 and 20 < at() < 50
    page.locator("#status", has_text=f"Position {at()}: ").wait_for(state="attached")
    page.get_by_role("slider", name="Position").fill("7")
    assert at() == 7 and page.get_by_role("slider").get_attribute("aria-valuetext").startswith("Position 7: ")


def test_the_next_surprise_is_one_and_a_link_to_it_opens_the_same_position(watched: Watched) -> None:
    page = watched.open("#/second/2")
    answer = httpx2.get(f"{watched.base}/v1/stores/second/documents/2").json()
    t = next(t for t in range(1, 299) if answer["surprise"][t] >= 4.5)
    page.get_by_role("button", name="Next surprise").click()
    page.wait_for_url(re.compile(rf"\?t={t}$"))
    page.get_by_role("heading", name=f"Position {t}", exact=True).wait_for()
    shown = page.locator(".panel").inner_text()
    again = watched.open(page.url.removeprefix(watched.base + "/"))
    assert again.locator(".panel").inner_text() == shown


def test_the_pointer_shows_a_position_and_leaves_the_chosen_one(watched: Watched) -> None:
    page = watched.open("#/first/2?t=100")
    page.locator('[data-i="96"]').hover()
    page.get_by_role("heading", name="Position 95").wait_for()
    assert page.url.endswith("t=100")
    page.locator("h1").hover()
    page.get_by_role("heading", name="Position 100").wait_for()
    page.locator('[data-i="96"]').click()
    page.wait_for_url(re.compile("t=95$"))


def test_what_is_shown_of_a_position_is_what_the_store_has(watched: Watched) -> None:
    page = watched.open("#/first/2?t=100")
    answer = httpx2.get(f"{watched.base}/v1/stores/first/documents/2").json()
    assert answer["token_ids"][101] not in answer["ids"][100]
    absent = page.get_by_role("heading", name="What followed is not kept").locator("+ ol .candidate")
    assert absent.count() == 1 and absent.locator(".filled.missing").count() == 1
    names = page.locator(".candidate:not(:has(.missing)) .mono").all_inner_texts()
    expected = [answer["texts"][str(token)].replace(" ", "␣") for token in answer["ids"][100]]
    assert names == expected
    head = page.locator(".candidates").nth(1).locator(".candidate")
    tail = page.locator(".candidates").nth(2)
    assert head.count() == answer["head"][100]
    assert tail.locator(".filled.tail").count() == len(expected) - answer["head"][100]
    assert "sampled" in page.get_by_role("heading", name="Tail").inner_text()
    shown = float(head.first.locator(".value").inner_text().rstrip(" %"))
    assert shown == pytest.approx(100 * answer["weights"][100][0], rel=0.05)


def test_documents_are_searched_and_a_mistake_is_told_beside_the_form(watched: Watched) -> None:
    page = watched.open("#/first")
    page.get_by_label("Where", exact=True).fill("length>100")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 document fits, 1 to 1 shown.").wait_for()
    assert page.url.endswith("where=length%3E100")
    told = page.locator(".told")
    page.get_by_label("Where", exact=True).fill("")
    page.get_by_label("Text has").fill("<SCRIPT>window")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("5 documents fit").wait_for()
    watched.complaints.clear()
    page.get_by_label("Where", exact=True).fill("nl>3")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("did you mean nll").wait_for()
    assert len(told.inner_text().splitlines()) == 1
    assert all("400" in complaint for complaint in watched.complaints)
    watched.complaints.clear()


def test_hit_rates_follow_without_a_reload(watched: Watched, base: str) -> None:
    watched.page.clock.install()
    page = watched.open("#/")
    card = page.locator(".card", has_text="second")
    before = card.inner_text()
    ids = page_tokens(40).tolist()
    assert httpx2.post(f"{base}/v1/stores/second/targets", json={"documents": [ids]}).status_code == 200
    page.clock.run_for(6000)
    card.get_by_text("Last hour: 1 hit and 0 misses").wait_for()
    assert "100 %" in card.inner_text() and "100 %" not in before


def test_who_teaches_and_what_waits_is_shown_as_it_changes(browser: Any, tmp_path: Path) -> None:
    page_store(tmp_path / "s" / "taught.zarr", "top-k:4", lengths=(20,))
    page_store(tmp_path / "s" / "other.zarr", "top-k:4", lengths=(20,), weights_digest="b" * 32)
    teacher, missing = Guesser(), {"documents": [page_tokens(31).tolist()]}
    with serving(tmp_path / "s", teacher=lambda: teacher) as base, ThreadPoolExecutor() as pool:
        watched = Watched(browser, base)
        watched.page.clock.install()
        page = watched.open("#/")
        asked = pool.submit(httpx2.post, f"{base}/v1/stores/taught/targets", json=missing, timeout=60)
        for text in ("1 document, 31 tokens in the queue", "nothing in the queue"):
            shown = page.locator(".card", has_text="taught").get_by_text(f"The teacher is ready · {text}")
            for _ in range(40):
                page.clock.run_for(5000)
                if shown.count():
                    break
            shown.wait_for()
            teacher.may.set()
        assert asked.result().status_code == 200
        httpx2.post(f"{base}/v1/stores/other/targets", json=missing, timeout=60)  # which shows whose teacher it is
        page.clock.run_for(5000)
        page.locator(".card", has_text="other").get_by_text("The teacher is another's").wait_for()
        assert watched.complaints == []
        watched.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_no_serious_fault(browser: Any, base: str, view: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    watched = Watched(browser, base, color_scheme=scheme)
    page = watched.open(VIEWS[view])
    if view == "store":
        page.get_by_text("perplexity on the labels").wait_for()
    for summary in page.locator("summary").all():
        summary.click()
    found = axe.Axe().run(page).response["violations"]
    serious = [(f["id"], [n["html"] for n in f["nodes"]][:3]) for f in found if f["impact"] in ("serious", "critical")]
    assert serious == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(246, 247, 249)",
        "dark": "rgb(15, 18, 22)",
    }.get(scheme)
    watched.context.close()


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_wider_than_a_phone(browser: Any, base: str, view: str) -> None:
    watched = Watched(browser, base, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = watched.open(VIEWS[view])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    if view in ("document", "comparison"):
        page.locator('[data-i="96"]').tap()
        page.get_by_role("heading", name="Position 95").wait_for()
    assert watched.complaints == [] and watched.foreign() == []
    watched.context.close()


def test_texts_of_a_store_are_shown_and_do_nothing(watched: Watched) -> None:
    page = watched.open("#/first")
    assert HOSTILE[0].decode() in page.locator(".documents").inner_text()
    assert TEACHER.rstrip("\u202e") in page.locator(".about").inner_text()
    page = watched.open("#/first/0?t=3")
    shown = page.locator(".text").inner_text()
    assert all(token.decode() in shown for token in HOSTILE[:3])
    assert "‹202E›evil‹2066›" in shown and "·😀" in shown and "‹0000›‹001B›[31m" in shown and "\u202e" not in shown
    assert "Position 0" in watched.open("#/first/1").locator(".panel").inner_text()  # of two tokens
    page = watched.open("#/first/0?t=3")
    for row in range(12):
        page.get_by_role("slider", name="Position").fill(str(row))
    assert page.locator("img, main script, iframe").count() == 0


def test_the_policy_lets_no_script_but_the_page_s_own_run(watched: Watched, base: str) -> None:
    policy = httpx2.get(base).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "trusted-types 'none'" in policy
    for path in FOLDER.iterdir():
        assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\(|https?://(?!www\.w3\.org/)| style=",
                             path.read_text(encoding="utf-8")), path  # fmt: skip
    page = watched.open("#/")
    refused = "() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } }"
    assert page.evaluate(refused)
    assert any("TrustedHTML" in complaint for complaint in watched.complaints)
    watched.complaints.clear()


def test_a_token_is_asked_for_and_kept_in_the_tab_alone(browser: Any, tmp_path: Path) -> None:
    page_store(tmp_path / "s" / "kept.zarr", "top-k:4", lengths=(9, 5, 7))
    secret = new_token(tmp_path / "tokens.json", "reader", ["read"])
    with serving(tmp_path / "s", tokens=tmp_path / "tokens.json") as base:
        watched = Watched(browser, base)
        page = watched.open("#/kept/0?t=2")
        field = page.get_by_label("Token", exact=True)
        assert field.get_attribute("type") == "password" and field.evaluate("e => e === document.activeElement")
        field.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        page.get_by_label("Token", exact=True).fill(secret)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Position 2").wait_for()
        assert page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]") == [
            0,
            "",
            [secret],
        ]
        assert secret not in page.url and all(secret not in url for url in watched.asked)
        page.get_by_role("button", name="Forget the token").click()
        page.get_by_label("Token", exact=True).wait_for()
        assert page.evaluate("sessionStorage.length") == 0
        assert all("401" in complaint for complaint in watched.complaints)
        watched.context.close()


def test_a_document_that_only_one_store_has_is_told_so(browser: Any, tmp_path: Path) -> None:
    page_store(tmp_path / "a.zarr", "top-k:4", lengths=(20,))
    page_store(tmp_path / "b.zarr", "top-k:4", lengths=(30,))
    with serving(tmp_path / "a.zarr", tmp_path / "b.zarr") as address:
        watched = Watched(browser, address)
        page = watched.open("#/a/0/compare/b")
        assert "b does not hold this document of a" in page.get_by_role("alert").inner_text()
        page = watched.open("#/a/7")
        assert "document '7' is not in a, which holds 1" in page.get_by_role("alert").inner_text()
        watched.context.close()
