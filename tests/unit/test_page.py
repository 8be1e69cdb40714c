"""``luo report``: the page in a real browser, and the documents that make none."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import luo

jinja2 = pytest.importorskip("jinja2", reason="needs luo-kho[report]")
pytest.importorskip("plotly", reason="needs luo-kho[report]")

from luo.profile.figures import sections  # noqa: E402
from luo.profile.page import page  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
COMMAND = [sys.executable, "-P", "-m", "luo"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    "PYTHONPATH": str(Path(luo.__file__).parents[1]),
    "COLUMNS": "100",
}
#: Names that a host or a driver may bring along.
HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "<a href='https://example.org/'>x</a>&lt;b&gt;",
    "%{customdata} {{ 7 * 7 }} ${hacked}",
    "\u202egnp.0\udcff\u2028'",
)
UPDATES = 6


def command(*arguments, cwd):
    """Run ``python -m luo`` in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where a run wrote ``run.json``."""
    path = tmp_path_factory.mktemp("page")
    (path / "small.toml").write_text(
        'memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n'
        '[[vms]]\nname = "vm"\ncount = 2\nvcpus = 2\nram = { 4KiB = "64KiB" }\n'
    )
    done = command(
        *("run", "--host", "small.toml", "--repeat", UPDATES, "--in-process"),
        *("--json", "run.json", "--budget", "blackout=1ns,kvm/RESTORE=1ns,prepare=100s"),
        cwd=path,
    )

    assert done.returncode == 3, done.stderr
    return path


@pytest.fixture(scope="module")
def document(directory):
    """What the run wrote, with hostile names in it."""
    run = json.loads((directory / "run.json").read_text())
    total = 9_007_199_254_740_993 // 10**6  # no float has it in seconds and in full
    run["worst_devices"] = [
        {"path": f"pci0000:00/{name}", "driver": name, "bus": "pci"}
        | {"total_ns": total - k, "blackout_ns": (total - k) // (k + 2)}
        for k, name in enumerate(HOSTILE)
    ]
    run["subtrees"] = [
        {"path": "", "parent": None, "devices": 60, "total_ns": 10 * total, "blackout_ns": total}
    ]
    for k, name in enumerate(HOSTILE):
        for parent, path in (("", f"{name}"), (name, f"{name}/{k}"), (name, f"{name}/…")):
            row = {"path": path, "parent": parent, "devices": k + 1}
            run["subtrees"].append(row | {"total_ns": total + k, "blackout_ns": total // (k + 1)})
    for row, name in zip(run["callbacks"], HOSTILE, strict=False):
        row["max_device"] = name
    run["callbacks"][0]["name"] = run["source"]["path"] = HOSTILE[0]
    return run


@pytest.fixture(scope="module")
def other(document):
    """An earlier run, whose RESTORE took half as long."""
    run = copy.deepcopy(document)
    for one in run["runs"]:
        one["phases_ns"]["restore"] //= 2
    return run


@pytest.fixture(scope="module")
def chromium():
    """A browser."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a browser does not run under our sanitizer")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=CHROMIUM)
        except playwright.Error as error:
            pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


class Visit:
    """A page that is open, and what the browser said of it."""

    def __init__(self, browser, path, **settings):
        self.said, self.requests = [], []
        self.page = browser.new_page(**settings)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def figures(self, selector, attribute="ns"):
        """Return the exact figures of a table's cells, row by row."""
        return self.page.eval_on_selector_all(
            f"{selector} tbody tr",
            "(rows, name) => rows.map((row) => [...row.cells]"
            ".filter((cell) => name in cell.dataset)"
            ".map((cell) => cell.dataset[name] === '' ? null : Number(cell.dataset[name])))",
            attribute,
        )

    def settle(self):
        """Wait until what was changed is drawn."""
        self.page.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def texts(self, selector):
        """Return the texts of what is selected."""
        return self.page.eval_on_selector_all(selector, "all => all.map(one => one.textContent)")

    def drawn(self, name):
        """Return the customdata of each trace of a figure that has it."""
        return self.page.evaluate(
            "(name) => document.getElementById(`plot-${name}`).data"
            ".map((trace) => trace.customdata).filter(Boolean).map((some) => [...some])",
            name,
        )


@pytest.fixture(scope="module")
def visit(chromium, directory, document, other):
    """The page of the document, open on a wide screen."""
    path = directory / "whole.html"
    path.write_text(page(document, other, names=("run.json", "other.json")), "utf-8")
    return Visit(chromium, path, viewport={"width": 1600, "height": 900})


def as_shown(name):
    """Return a name as UTF-8 can have it."""
    return name.encode("utf-8", "backslashreplace").decode()


# ---- in the browser ----


def test_page_asks_for_nothing_and_the_console_is_silent(visit):
    """The page loads itself and nothing else; no error, no warning, no violation of its policy."""
    figures = visit.page.locator("[data-figure] .main-svg").count()

    assert figures > 8
    assert visit.said == []
    assert visit.requests == [visit.page.url]


def test_headline_equals_the_document(visit, document):
    """The figures at the top are those of the document."""
    shown = {
        key: float(visit.page.get_attribute(f"#head-{key}", "value"))
        for key in ("blackout", "prepare", "preserved", "reclaimed", "memory", "state")
    }

    devices, image = document["devices"], document["image"]
    assert shown == {
        "blackout": document["phases_ns"]["blackout"],
        "prepare": document["phases_ns"]["prepare"],
        "preserved": devices["preserved"],
        "reclaimed": devices["reclaimed"],
        "memory": image["preserved_pages"] * image.get("page_bytes", 4096),
        "state": devices["state_bytes"],
    }


def test_budgets_equal_the_document(visit, document):
    """What is over budget is told first, with the p95, the limit and who is to blame."""
    judged = document["budgets"]["budgets"]
    first, second = "#budgets .figures:nth-child(1)", "#budgets .figures:nth-child(2)"

    assert visit.page.inner_text("#budgets h2") == "Over budget: 2 of 3"
    assert visit.texts(f"{first} tbody th") == [one["name"] for one in judged]
    assert visit.figures(first) == [[one["p95_ns"], one["limit_ns"]] for one in judged]
    worst = [part for one in judged for part in one["worst"]]
    expected = []
    for part in worst:
        expected += [[part["p95_ns"]], *([device["ns"]] for device in part["devices"])]
    assert visit.figures(second) == expected


def test_timeline_equals_the_document(visit, document):
    """Each phase is in the table and in the drawing, of each kernel, in order."""
    timeline = document["timeline"]
    expected = [
        [begin, end - begin] for kernel in timeline["kernels"] for _, begin, end in kernel["phases"]
    ]

    assert visit.figures("#part-timeline") == sorted(expected)
    assert visit.drawn("timeline")[: len(expected)] == [[length] for _, length in expected]
    shade = visit.page.evaluate("document.getElementById('plot-timeline').layout.shapes[0]")
    assert [round(shade[key] * 1e9) for key in ("x0", "x1")] == timeline["blackout"]


def test_costs_are_the_sums_of_the_document(visit, document):
    """Each cell is the mean of an update, of all callbacks of a subsystem and event."""
    events = visit.texts("#part-costs thead th:nth-child(n+3)")
    names = visit.texts("#part-costs tbody th")
    rows = document["callbacks"]
    spent = Counter()
    for row in rows:
        late = row["event"] == "RESTORE" and row["blackout_share"] is None
        spent[row["subsystem"], "late RESTORE" if late else row["event"]] += row["total_ns"]

    assert {*names} == {subsystem for subsystem, _ in spent}
    assert {*events} == {event for _, event in spent}
    for name, (_, *cells) in zip(names, visit.figures("#part-costs"), strict=True):
        for event, cell in zip(events, cells, strict=True):
            known = (name, event) in spent
            assert cell == (round(spent[name, event] / UPDATES) if known else None)
    total = sum(sum(trace) for trace in visit.drawn("costs")) * UPDATES
    assert total == pytest.approx(sum(row["total_ns"] for row in rows))


def test_callbacks_equal_the_document(visit, document):
    """Every callback is there with every figure, the dearest first; the dots are the medians."""
    rows = sorted(document["callbacks"], key=lambda row: -row["total_ns"])
    keys = ("total_ns", "min_ns", "p50_ns", "p95_ns", "p99_ns", "max_ns")

    assert visit.figures("#part-callbacks") == [[row[key] for key in keys] for row in rows]
    counts = [[row["calls"], row["devices"], row["blackout_share"]] for row in rows]
    assert visit.figures("#part-callbacks", "value") == counts
    (medians,) = visit.drawn("callbacks")
    assert medians == [row["p50_ns"] for row in rows[: len(medians)]]


def test_histograms_have_every_call_and_one_is_shown(visit, document):
    """The bars of a histogram hold the calls of its buckets; choosing shows another."""
    rows = sorted(document["callbacks"], key=lambda row: -row["total_ns"])
    for place, row in enumerate(rows):
        bars = visit.figures(f"#part-histogram-{place}")
        counts = [count for (count,) in visit.figures(f"#part-histogram-{place}", "value")]

        assert sum(counts) == sum(count for *_, count in row["histogram"])
        for (low, high), count in zip(bars, counts, strict=True):
            assert count == sum(n for at, _, n in row["histogram"] if low <= at < high)
    choice = visit.page.locator("#histograms-choice")
    choice.select_option("histogram-2")
    shown = visit.page.locator("#histograms .part:visible").evaluate_all(
        "all => all.map(o => o.id)"
    )
    choice.select_option("histogram-0")

    assert shown == ["part-histogram-2"]


def test_devices_and_subtrees_equal_the_document(visit, document):
    """Dearest devices and subtrees have their names and figures, however the names look."""
    for part, key in (("devices", "worst_devices"), ("tree", "subtrees")):
        rows = document[key]
        names = [as_shown(row["path"]) or "all devices" for row in rows]

        assert visit.texts(f"#part-{part} tbody th") == names
        figures = [[row["blackout_ns"], row["total_ns"]] for row in rows]
        assert visit.figures(f"#part-{part}") == figures
    inside, outside = visit.drawn("devices")
    worst = document["worst_devices"]
    assert inside == [row["blackout_ns"] for row in worst]
    assert outside == [row["total_ns"] - row["blackout_ns"] for row in worst]
    assert visit.drawn("tree") == [[row["total_ns"] for row in document["subtrees"]]]


def test_spread_equals_the_document(visit, document):
    """Each update is in the drawing and in the table under it."""
    phases = visit.texts("#part-spread tbody th")
    runs = [one["phases_ns"] for one in document["runs"]]

    assert visit.drawn("spread") == [[run[name] for run in runs] for name in phases]
    assert visit.figures("#spread details") == [[run[name] for name in phases] for run in runs]
    for name, (low, _, _, high) in zip(phases, visit.figures("#part-spread"), strict=True):
        assert [low, high] == [min(run[name] for run in runs), max(run[name] for run in runs)]


def test_comparison_shows_what_got_slower(visit, document):
    """RESTORE took half as long before: it is the only thing that the page calls slower."""
    names = visit.texts("#part-comparison tbody th")
    changes = [change for change, *_ in visit.figures("#part-comparison", "value")]
    verdicts = visit.texts("#part-comparison td:nth-child(3)")

    assert changes[names.index("restore")] == pytest.approx(1, abs=0.01)
    assert {*verdicts} <= {"slower", "no difference", "too few runs"}
    assert [name for name, said in zip(names, verdicts, strict=True) if said == "slower"] in (
        ["restore"],
        [],  # the machine was busy in one of the six updates
    )


def test_hostile_names_run_no_script_and_make_no_elements(visit):
    """What a device calls itself is text, in tables and in drawings."""
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.locator("main img, main a[href^=https], svg a").count() == 0
    assert HOSTILE[0] in visit.page.title()
    labels = visit.texts("#plot-devices .ytick text")
    assert labels[0].endswith("</script>")
    assert labels[2].endswith("x</a>&lt;b&gt;")
    assert visit.said == []


@pytest.mark.parametrize("width", [360, 700, 1600])
def test_no_screen_scrolls_sideways(visit, width):
    """Nothing is wider than the screen: wide tables scroll by themselves."""
    visit.page.set_viewport_size({"width": width, "height": 800})
    visit.settle()
    visit.page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(plot => !plot.clientWidth ||"
        " Math.abs(plot.clientWidth - plot.querySelector('.main-svg').clientWidth) < 2)"
    )
    wide = visit.page.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, svg')"
        " && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML)"
    )

    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert wide == []


def test_every_thing_to_use_is_reached_by_keyboard(visit):
    """Tab goes through the page once, and where it is can be seen."""
    visit.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(400):
        visit.page.keyboard.press("Tab")
        where = visit.page.evaluate(
            "(() => { const one = document.activeElement; return one === document.body ? null :"
            " [one.tagName, one.id || one.className || one.textContent.trim(),"
            " getComputedStyle(one).outlineStyle !== 'none']; })()"
        )
        if where is None:
            break
        reached.append(where)
    tags = [tag for tag, *_ in reached]

    assert reached[0][:2] == ["A", "skip"]
    assert all(seen for *_, seen in reached)
    assert {"A", "BUTTON", "SELECT", "DIV", "SUMMARY"} == {*tags}
    shown = visit.page.locator(".scroll:visible").count()
    assert tags.count("DIV") == shown
    assert tags.count("SUMMARY") == visit.page.locator("summary").count()


def test_subtree_is_chosen_by_keyboard_and_by_click(visit):
    """A subtree alone is drawn, whichever way it was asked for."""
    zoom = visit.page.locator("#tree-zoom")
    zoom.select_option(index=1)
    level = visit.page.evaluate("document.getElementById('plot-tree').data[0].level")
    zoom.select_option(index=0)
    again = visit.page.evaluate("document.getElementById('plot-tree').data[0].level")
    visit.page.locator("#plot-tree .slice").nth(1).click()

    assert (level, again) == ("/" + HOSTILE[0], "/")
    assert zoom.input_value() != "/"
    zoom.select_option(index=0)


def test_table_is_sorted_by_its_figures(visit):
    """A click on a title sorts, by the exact figure and not by what is read; another turns it."""
    button = visit.page.locator("#part-callbacks thead button", has_text="max")
    button.click()
    falling = [row[-1] for row in visit.figures("#part-callbacks")]
    button.press("Enter")
    rising = [row[-1] for row in visit.figures("#part-callbacks")]

    assert falling == sorted(falling, reverse=True)
    assert rising == sorted(falling)
    sorts = visit.page.locator("#part-callbacks th[aria-sort]")
    assert sorts.evaluate_all("all => all.map(o => o.ariaSort)") == ["ascending"]
    visit.page.locator("#part-callbacks thead button", has_text="total").click()


def test_dark_and_light_follow_the_system_and_the_button(visit):
    """Page and drawings have the colours of the scheme, and texts contrast with the card."""
    seen = {}
    for scheme in ("dark", "light"):
        visit.page.emulate_media(color_scheme=scheme)
        visit.settle()
        seen[scheme] = visit.page.evaluate(LUMINANCES)
    visit.page.locator("#theme").click()
    visit.page.locator("#theme").click()
    by_button = visit.page.evaluate(LUMINANCES)
    visit.page.locator("#theme").click()

    assert by_button == seen["dark"] != seen["light"]
    for card, *inks in seen.values():
        for ink in inks:
            low, high = sorted((card, ink))
            assert (high + 0.05) / (low + 0.05) >= 4.5


#: Of a card, and of the texts on it: paragraphs, headings of columns, links, texts of drawings.
LUMINANCES = """(() => {
  const of = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = (selector, name) => of(getComputedStyle(document.querySelector(selector))[name]);
  return [style(".card", "backgroundColor"), style(".lead", "color"), style("thead th", "color"),
    style("summary", "color"), style("#head-blackout", "color"),
    style("#plot-costs .ytick text", "fill")];
})()"""


def test_printing_is_light_and_whole(visit):
    """Paper is white, details are open, and the screen comes back as it was."""
    visit.page.emulate_media(color_scheme="dark")
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    theme = visit.page.evaluate("document.documentElement.dataset.theme")
    closed = visit.page.locator("details:not([open])").count()
    visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
    after = visit.page.evaluate("document.documentElement.dataset.theme")
    visit.page.emulate_media(color_scheme="light")

    assert (theme, closed, after) == ("light", 0, "auto")


def test_failed_update_says_why_and_that_it_was_rolled_back(chromium, directory):
    """A page of a failed update begins with its error, and draws what there is."""
    done = command(
        *("run", "--host", "small.toml", "--callback-limit", "1ns", "--in-process"),
        *("--json", "failed.json"),
        cwd=directory,
    )
    assert done.returncode == 1
    made = command("report", "failed.json", cwd=directory)
    assert (made.returncode, made.stderr) == (0, "")
    visit = Visit(chromium, directory / "failed.html", viewport={"width": 360, "height": 740})
    error = json.loads((directory / "failed.json").read_text())["error"]

    assert error["errno_name"] in visit.page.inner_text("#failed h2")
    assert visit.page.inner_text("#failed .message") == error["message"]
    assert visit.texts(".trouble tbody th") == error["undo_errors"]
    assert visit.page.locator("#timeline").count() == 0
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    assert visit.said == []


def test_page_without_scripts_has_every_table(chromium, directory, visit):
    """A reader that runs no script sees all figures as tables, those of all histograms too."""
    path = directory / "whole.html"
    still = Visit(chromium, path, java_script_enabled=False)
    html = path.read_text("utf-8")
    names = re.findall(r'id="part-([\w-]+)"', html)

    assert all(still.page.is_visible(f"#part-{name} table") for name in names)
    assert "histogram-1" in names


# ---- without one ----


def test_document_without_the_newer_keys_is_drawn(directory):
    """A document that has no timeline, histograms or devices makes a page of what it has."""
    run = json.loads((directory / "run.json").read_text())
    for key in ("timeline", "worst_devices", "subtrees", "clock", "budgets"):
        del run[key]
    for row in run["callbacks"]:
        for key in ("histogram", "p95_ns", "max_device", "blackout_share"):
            del row[key]

    names = [section.name for section in sections(run)]

    assert "Dearest in blackout" in page(run)
    assert names == ["timeline", "costs", "callbacks", "spread"]


def test_dry_run_is_drawn(directory):
    """PREPARE, REBOOT and CANCEL of a dry run are the timeline."""
    done = command(
        *("run", "--host", "small.toml", "--dry-reboot", "--json", "dry.json"), cwd=directory
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((directory / "dry.json").read_text())

    timeline = sections(run)[0]

    assert [row[0] for row in timeline.parts[0].table.rows] == ["prepare", "reboot", "cancel"]
    assert "Dry run" in page(run)


def test_huge_document_makes_a_page_of_bounded_size(document):
    """A million of everything is cut, and the page says so."""
    run = copy.deepcopy(document)
    run["callbacks"] = [
        row | {"name": f"{k:040}"} for k in range(400) for row in run["callbacks"][:9]
    ]
    run["failures"] = [{"event": "FINISH", "message": "x" * 10_000}] * 5_000
    run["states"] = ["normal"] * 100_000
    run["runs"] = run["runs"] * 2_000
    run["worst_devices"] = run["worst_devices"] * 10_000
    run["subtrees"] = run["subtrees"][:1] + run["subtrees"][1:] * 10_000
    small, large = len(page(document)), len(page(run))

    assert large - small < 1_500_000
    assert "4,744 more are in the document" in page(run)


def test_no_comparison_with_an_update_that_failed(document):
    """The page of a good run says why there is nothing to compare it with."""
    failed = copy.deepcopy(document) | {"error": {"message": "no <luck>"}, "runs": []}

    text = page(document, failed, names=("a", "b"))

    assert "There is nothing to compare with b" in text
    assert "no &lt;luck&gt;" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        ("[]", "no luo-run/1 document"),
        ('{"schema": "luo-compare/1"}', "no luo-run/1 document"),
        ('{"schema": "luo-run/1"}', "is not whole: KeyError"),
        ("[" * 100_000, "no JSON"),
        ("\udcff", "no JSON"),
    ],
)
def test_report_of_something_else_is_one_line_and_status_2(directory, text, said):
    """What is no document is told in one line, and makes no page."""
    (directory / "bad.json").write_text(text, errors="surrogateescape")

    done = command("report", "bad.json", cwd=directory)

    assert done.returncode == 2
    assert done.stderr.startswith("luo: bad.json: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (directory / "bad.html").exists()


@pytest.mark.parametrize("value", ["x", None, {}, [], 1e400, float("nan"), 10**400])
def test_figure_that_is_none_is_a_value_error(document, value):
    """Whatever stands where nanoseconds should be, there is one error for it."""
    for spoil in (
        lambda run: run["callbacks"][0].update(total_ns=value),
        lambda run: run["runs"][0]["phases_ns"].update(blackout=value),
        lambda run: run["timeline"].update(blackout=[value, value]) if value else None,
        lambda run: run["subtrees"][0].update(total_ns=value) if value else None,
        lambda run: run["callbacks"][1]["histogram"].append([value, value, value]),
    ):
        run = copy.deepcopy(document)
        spoil(run)
        if run != document:
            with pytest.raises(ValueError, match="luo-run/1 document is not whole"):
                page(run)


def test_report_writes_beside_the_run_or_where_it_is_told(directory):
    """RUN.html by default, -o elsewhere; a place that cannot be written is told before the work."""
    made = command("report", "run.json", cwd=directory)
    named = command("report", "run.json", "run.json", "-o", "sub.html", cwd=directory)
    lost = command("report", "run.json", "-o", "nowhere/x.html", cwd=directory)
    missing = command("report", "none.json", cwd=directory)

    assert (made.returncode, named.returncode) == (0, 0)
    assert made.stdout.startswith("run.html: ")
    assert "There is nothing to compare" not in (directory / "sub.html").read_text("utf-8")
    assert lost.stderr == "luo: -o nowhere/x.html: No such file or directory\n"
    assert missing.stderr == "luo: none.json: No such file or directory\n"
    assert (lost.returncode, missing.returncode) == (2, 2)


def test_report_never_overwrites_what_it_is_made_of(directory):
    """The document stays, whatever the page is to be called."""
    before = (directory / "run.json").read_bytes()
    (directory / "link.html").symlink_to("run.json")
    for arguments in (("run.json", "-o", "run.json"), ("run.json", "-o", "link.html")):
        done = command("report", *arguments, cwd=directory)

        assert done.returncode == 2
        assert done.stderr.endswith("the page is made of it\n")
    assert (directory / "run.json").read_bytes() == before


def test_page_of_an_error_without_details_is_made(document):
    """An error that has a message alone is shown with that."""
    assert "no &lt;luck&gt;" in page(document | {"error": {"message": "no <luck>"}})


def test_report_without_its_extra_says_what_to_install(directory, tmp_path):
    """A missing plotly is one line that names the extra."""
    (tmp_path / "plotly.py").write_text("raise ImportError('No module named plotly')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import luo.cli; luo.cli.main()"

    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "report", "run.json"],
        cwd=directory,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
    )

    assert done.returncode == 2
    assert "pip install 'luo-kho[report]'" in done.stderr
    assert done.stderr.count("\n") == 1
