"""The page of all runs: what is in it, that no run can bring in HTML, and, where Chromium is there, how it is used."""

import base64
import hashlib
import json
import re
import statistics
from html.parser import HTMLParser

import pytest
from browser import PROGRAM, Browser

from flatcl.utils.commands import report
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import ROOT
from flatcl.utils.reports import page
from flatcl.utils.reports.runs import all_runs

HOSTILE = "</script><img src=x onerror=alert(1)><!--\u2028&amp;\"'${1}"
WHERE = "results"


def make_run(root, model="er", seed=0, accuracy=0.8, status="finished", dataset="seq-mnist", optimizer="sgd", notes="",
             digest=None, log=None, time="20260101-120000", environment=None, has_summary=True, **flags):  # fmt: skip
    """Writes a run folder below `root`, as utils/engine/results.py lays it out; returns it."""
    given = {"model": model, "dataset": dataset, "optimizer": optimizer, "seed": seed, "lr": 0.1, **flags}
    digest = digest or hashlib.sha256(repr((given, status)).encode()).hexdigest()[:12]
    folder = root / "class-il" / dataset / model / f"{time}-{hashlib.sha256(digest.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True)
    defaults = {"n_epochs": 1, "joint": False, "batch_size": 32}
    entries = {name: {"value": value, "origin": "argv"} for name, value in given.items()}
    entries |= {name: {"value": value, "origin": "default"} for name, value in defaults.items() if name not in given}
    config = {"protocol": 1, "config_hash": digest, "plugins": [], "code": {f"models/{model}.py": "12ab"},
              "flags": entries}  # fmt: skip
    numbers = {"final_average_accuracy": accuracy, "forgetting_chaudhry18": 0.1}
    summary = {
        "model": model, "dataset": dataset, "optimizer": optimizer, "setting": "class-il", "seed": seed,
        "status": status, "metrics": {"class-il": numbers, "task-il": numbers | {"final_average_accuracy": 0.9}},
        "cost": {"train_s": 10.0 + seed, "forward_rows": 1000}, "config_hash": digest, "notes": notes,
    }  # fmt: skip
    environment = environment or {
        "commit": "0123456789abcdef",
        "packages": {"torch": "2.0"},
        "uncommitted_changes": False,
    }
    tasks = [{"classes": [1], "train_rows": 5, "test_rows": 2}, {"classes": [0], "train_rows": 6, "test_rows": 3}]
    benchmark = {"class_order": [1, 0], "tasks": tasks}
    contents = {"config": config, "environment": environment, "benchmark": benchmark}
    for name, content in (contents | ({"summary": summary} if has_summary else {})).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if log is not None:
        (root / "logs").mkdir(exist_ok=True)
        (root / "logs" / f"{digest}.log").write_text(log)
    return folder


class Parsed(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def built(folder, **options):
    return page.build(all_runs([folder]), [folder], **options)


def data_of(text):
    """What the page embeds."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def write(root, *words):
    """The exit code of the command that writes the page to page.html in `root`."""
    return report.main([str(root / WHERE), "--html", str(root / "page.html"), *words])


@pytest.fixture
def results(tmp_path):
    """Three seeds of two methods: er 0.80, 0.82, 0.87 (mean 0.83), derpp 0.5, 0.6, 0.7 (mean 0.6, std 0.1)."""
    for seed, (er, derpp) in enumerate([(0.80, 0.5), (0.82, 0.6), (0.87, 0.7)]):
        make_run(tmp_path / WHERE, seed=seed, accuracy=er, buffer_size=200)
        make_run(tmp_path / WHERE, model="derpp", seed=seed, accuracy=derpp, buffer_size=500, alpha=0.5)
    return tmp_path / WHERE


def test_groups_are_those_of_the_report(results):
    (parts,) = data_of(built(results))["sections"]
    assert [part["setting"] for part in parts] == ["class-il", "task-il"]
    assert parts[0]["keys"] == ["dataset", "model", "optimizer", "buffer_size"]
    rows = [
        (row["values"], [text for text, _ in row["cells"]], len(row["runs"]), row["notes"]) for row in parts[0]["rows"]
    ]
    spread = 100 * statistics.stdev([0.80, 0.82, 0.87])
    assert rows == [
        (["seq-mnist", "derpp", "sgd", 500], ["60.00 ± 10.00", "10.00 ± 0.00"], 3, ""),
        (["seq-mnist", "er", "sgd", 200], [f"83.00 ± {spread:.2f}", "10.00 ± 0.00"], 3, ""),
    ]
    assert [row["cells"][0][0] for row in parts[1]["rows"]] == ["90.00 ± 0.00"] * 2


def test_validation_runs_have_groups_of_their_own(results):
    make_run(results, seed=0, accuracy=0.1, buffer_size=200, validation=True)
    rows = data_of(built(results))["sections"][0][0]["rows"]
    assert [(row["values"][1], row["split"], len(row["runs"])) for row in rows] == [
        ("derpp", "test split", 3), ("er", "test split", 3), ("er", "validation split", 1)
    ]  # fmt: skip
    assert rows[1]["cells"][0][1] == pytest.approx(0.83)


def test_a_group_says_what_it_mixes(results):
    make_run(results, seed=3, buffer_size=200, lr=0.3)
    notes = [row["notes"] for row in data_of(built(results))["sections"][0][0]["rows"]]
    assert notes == ["", "mixes runs of lr = 0.1, 0.3"]
    assert data_of(built(results))["columns"][-1] == "lr"


def test_runs_that_did_not_finish_are_there_and_in_no_mean(results):
    make_run(results, seed=5, status="diverged", accuracy=0.0, buffer_size=200)
    make_run(results, seed=6, has_summary=False, buffer_size=200)
    make_run(results, seed=7, status="interrupted", accuracy=0.0, buffer_size=200)
    data = data_of(built(results))
    assert sorted(run["status"] for run in data["runs"]) == ["diverged", *["finished"] * 6, "interrupted", "no result"]
    assert [row["cells"][0][1] for row in data["sections"][0][0]["rows"]] == pytest.approx([0.6, 0.83])
    empty = results.parent / "empty"
    make_run(empty, has_summary=False, digest="012abc", log="why it ended")
    (run,) = data_of(built(empty))["runs"]
    assert (run["status"], run["hash"], run["log"]) == ("no result", "012abc", "why it ended")
    assert data_of(built(empty))["sections"] == [[]]


def test_of_equal_runs_the_newest_counts_and_the_others_are_marked(results):
    make_run(results, seed=9, accuracy=0.3, digest="twice", buffer_size=200)
    folder = make_run(results, seed=9, accuracy=0.4, digest="twice", buffer_size=200, time="20260102-000000")
    data = data_of(built(results))
    marked = {run["folder"]: run["status"] for run in data["runs"] if run["hash"] == "twice"}
    assert sorted(marked.values()) == ["finished", "repeated"] and marked[folder.name] == "finished"
    (row,) = [row for row in data["sections"][0][0]["rows"] if row["values"][1] == "er"]
    assert row["cells"][0][1] == pytest.approx((0.80 + 0.82 + 0.87 + 0.4) / 4)


def test_nothing_that_a_run_brings_along_becomes_html(tmp_path):
    root = tmp_path / WHERE
    make_run(root, notes=HOSTILE, log=f"{HOSTILE}\n", environment={"commit": HOSTILE, HOSTILE: HOSTILE}, lr=HOSTILE)
    make_run(root, model=HOSTILE.replace("/", ""), seed=1, status=HOSTILE)
    (root / "README.md").write_text(f"# {HOSTILE}\n")
    text = built(root, figures={HOSTILE: f"<svg>{HOSTILE}</svg>"}, notes=[HOSTILE])
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags if tag in ("script", "img", "iframe", "object", "svg")] == [
        "img",
        "script",
        "script",
    ]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    embedded = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert embedded.isascii() and not set("<>&") & set(embedded)
    data = json.loads(embedded)
    assert data["runs"][1]["notes"] == HOSTILE or data["runs"][0]["notes"] == HOSTILE
    assert {run.get("log") for run in data["runs"]} == {None, HOSTILE}


def test_only_the_scripts_and_styles_of_the_page_may_run_and_nothing_is_fetched(results):
    text = built(results)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind, element in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        (content,) = re.findall(element, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[kind] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert not re.search(
        r"https?://|<link[^>]*href=\"(?!data:)|@import|url\(|innerHTML|outerHTML|insertAdjacent|eval\(", text
    )


def test_the_same_runs_give_the_same_bytes(results):
    first = built(results)
    assert built(results) == first
    assert all(date.startswith("20260101") for date in re.findall(r"20\d\d[-]?\d\d[-]?\d\d", first))


def test_what_runs_share_is_there_once(results):
    small = len(built(results))
    for seed in range(100, 200):
        make_run(results, seed=seed, buffer_size=200)
    data, text = data_of(built(results)), built(results)
    assert len(text) - small < 100 * 900
    assert len(data["environments"]) == len(data["seeded"]) == 1 and len(data["codes"]) == 2
    assert data["common"]["n_epochs"] == {"value": 1, "origin": "default"}
    assert all("n_epochs" not in run["own"] and "lr" not in run["own"] for run in data["runs"])


def test_logs_are_cut_and_the_newest_fit(tmp_path, monkeypatch, capsys):
    root = tmp_path / WHERE
    make_run(root, seed=0, time="20260101-000000", log="old\n" * 50)
    make_run(root, seed=1, time="20260102-000000", log="".join(f"line {number}\n" for number in range(1000)))
    make_run(root, seed=2, time="20260103-000000", log="10 %\r50 %\r\x1b[1m100 %\x1b[0m\nend\n")
    logs = {run["values"][-1]: run["log"] for run in data_of(built(root))["runs"]}
    assert logs[2] == "100 %\nend"
    assert logs[1].splitlines() == ["[earlier lines are left out]", *(f"line {number}" for number in range(800, 1000))]
    monkeypatch.setattr(page, "LOGS_BYTES", 2100)
    assert write(tmp_path) == 0
    text = (tmp_path / "page.html").read_text()
    assert [run["log"] is None for run in data_of(text)["runs"]] == [True, False, False]
    assert "1 of 3 logs are left out, of the oldest runs" in text


def test_a_log_is_looked_for_in_its_folder_alone(tmp_path):
    root = tmp_path / WHERE
    (tmp_path / "secret.log").write_text("secret")
    make_run(root, seed=0, digest="../../secret")
    make_run(root, seed=1, digest="linked", log="")
    (root / "logs" / "linked.log").unlink()
    (root / "logs" / "linked.log").symlink_to(tmp_path / "secret.log")
    assert "secret" not in {run.get("log") for run in data_of(built(root))["runs"]}


def test_the_records_of_the_repository_have_a_section_each():
    folder = ROOT / "tests/records"
    records = sorted(folder.rglob("runs.jsonl"))
    text = built(folder)
    data = data_of(text)
    assert len(data["titles"]) == len(records) > 5
    assert len(data["runs"]) == sum(len(file.read_text().splitlines()) for file in records)
    heading = (folder / "sharpness/README.md").read_text().splitlines()[0].removeprefix("# ")
    assert f"{heading}: seq-fmnist" in data["titles"]
    assert f"<h2>{heading}: seq-fmnist</h2>" in text
    assert str(ROOT) not in text.replace("\\/", "/")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--html", "page.txt"], "--html expects a file that ends in .html, got 'page.txt'."),
        (["--html", "nowhere/page.html"], "--html: there is no folder nowhere."),
        (["--html", "a.html", "--pivot", "dataset"], "--pivot is for the table, which --html replaces."),
        (["--html", "a.html", "--format", "csv"], "--format is for the table, which --html replaces."),
        (["--html", "a.html", "--by", "modle"], "unknown key: 'modle'. Did you mean model?"),
        (["--html", "a.html", "--metrics", "forgeting"], "unknown metric: 'forgeting'."),
        (["--html", "a.html", "--setting", "clas-il"], "unknown setting: 'clas-il'. Did you mean class-il or task-il?"),
    ],
)
def test_wrong_words_are_explained(results, words, message, monkeypatch, capsys):
    monkeypatch.chdir(results.parent)
    assert report.main([WHERE, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (results.parent / "a.html").exists()


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no runs in"):
        all_runs([tmp_path])


def test_the_command_writes_the_page_in_place_of_the_table(results, capsys):
    assert write(results.parent, "--where", "model=er") == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r".*page\.html: 3 run\(s\), 0\.\d MB\n", printed.out) and printed.err == ""
    assert len(data_of((results.parent / "page.html").read_text())["runs"]) == 3
    assert write(results.parent, "--out", str(results.parent / "table.csv"), "--format", "csv") == 0
    assert (results.parent / "table.csv").read_text().startswith("dataset,model,")


def luminance(colour):
    """Of #rrggbb, WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_have_enough_contrast():
    """4.5 for text, 3 for the edges of controls (WCAG 2.1, level AA)."""
    style = (ROOT / "utils/reports/page.css").read_text()
    pairs = [("text", "ground"), ("text", "raised"), ("text", "chosen"), ("quiet", "ground"), ("quiet", "raised"),
             ("link", "ground"), ("link", "raised"), ("link", "chosen"), ("warn", "warn-ground"), ("bad", "bad-ground"),
             ("mark", "mark-ground"), ("edge", "ground"), ("edge", "raised")]  # fmt: skip
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in style.split(":root")[1:3]]
    assert len(themes) == 2 and themes[0]["ground"] != themes[1]["ground"]
    for colours in themes:
        for one, other in pairs:
            low, high = sorted((luminance(colours[one]), luminance(colours[other])))
            assert (high + 0.05) / (low + 0.05) >= (3 if one == "edge" else 4.5), (one, other)


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("needs Chromium (on Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(figures)`: the browser at a page of ten runs, one of them hostile, one unfinished, one on a validation
    split; it must have nothing to complain of at the end."""
    root = tmp_path / WHERE
    for seed, (er, derpp) in enumerate([(0.80, 0.5), (0.82, 0.6), (0.62125, 0.7)]):
        make_run(root, seed=seed, accuracy=er, buffer_size=200, log=f"the log of seed {seed}\n")
        make_run(root, model="derpp", seed=seed, accuracy=derpp, buffer_size=1000, alpha=0.5)
    make_run(root, model="gdumb", optimizer="sam", accuracy=0.7, rho=0.05, notes=HOSTILE, log=HOSTILE, buffer_size=200)
    make_run(root, model="sgd", seed=1, status="diverged", accuracy=0.99)
    make_run(root, model="er", seed=2, accuracy=0.4, validation=True, buffer_size=200)
    make_run(root, model="joint", seed=10, accuracy=0.95, lr=0.25)
    del browser.problems[:]

    def open_page(**options):
        (tmp_path / "page.html").write_text(built(root, **options), encoding="utf-8")
        browser.open(tmp_path / "page.html")
        browser.show(1280, 900)
        return browser

    yield open_page
    assert browser.problems == []


NAMES = "[...{table}.tHead.rows[0].cells].map((cell) => (cell.querySelector('.print') ?? cell).textContent)"


def column(browser, name, where="#runs"):
    """The texts of a column of the first table there."""
    table = f"document.querySelector('{where} table')"
    place = browser.js(NAMES.format(table=table)).index(name)
    return browser.js(f"[...{table}.tBodies[0].rows].map((row) => row.cells[{place}].textContent)")


def head(browser, name, where="#runs"):
    """JavaScript for a heading of the first table there."""
    table = f"document.querySelector('{where} table')"
    return f"{table}.tHead.rows[0].cells[{browser.js(NAMES.format(table=table)).index(name)}]"


def test_a_click_sorts_and_so_does_the_keyboard(opened):
    browser = opened()
    name = "final_average_accuracy (%)"
    browser.js(f"{head(browser, name)}.querySelector('button').click()")
    assert browser.js(f"{head(browser, name)}.getAttribute('aria-sort')") == "ascending"
    rising = ["40.00", "50.00", "60.00", "62.12", "70.00", "70.00", "80.00", "82.00", "95.00"]
    assert column(browser, name) == [*rising, "–"]  # 62.125 as Python writes it; a run that diverged has no result
    browser.js(f"{head(browser, name)}.querySelector('button').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.js(f"{head(browser, name)}.getAttribute('aria-sort')") == "descending"
    assert column(browser, name) == [*rising[::-1], "–"]
    browser.js(f"{head(browser, 'seed')}.querySelector('button').click()")
    assert browser.js(f"{head(browser, name)}.getAttribute('aria-sort')") is None
    assert column(browser, "seed")[-1] == "10"  # a number, not a word
    browser.js(f"{head(browser, 'model')}.querySelector('button').click()")
    assert column(browser, "model") == sorted(column(browser, "model"))
    browser.js(f"{head(browser, name, '#place-0')}.querySelector('button').click()")
    means = [float(text.split()[0]) for text in column(browser, name, "#place-0")]
    assert means == sorted(means) and len(means) == 5


def choose(browser, name, value):
    """Uses a filter as a reader does."""
    field, event = f"document.getElementById('filter-{name}')", "input" if name == "text" else "change"
    browser.js(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('{event}'))")


def test_filters_are_for_all_tables(opened):
    browser = opened()
    choose(browser, "model", "derpp")
    assert column(browser, "model") == ["derpp"] * 3 and column(browser, "model", "#place-0") == ["derpp"]
    choose(browser, "buffer_size", "200")
    assert column(browser, "model") == []
    browser.js("document.querySelector('#filters button[type=reset]').click()")
    assert len(column(browser, "model")) == 10
    choose(browser, "text", "gdumb onerror=")
    wait_for(browser, "document.querySelectorAll('#runs tbody tr').length === 1")
    assert column(browser, "model") == ["gdumb"]
    choose(browser, "text", "")
    choose(browser, "setting", "task-il")
    wait_for(browser, "document.querySelectorAll('#runs tbody tr').length === 10")
    assert set(column(browser, "final_average_accuracy (%)")) == {"90.00", "–"}
    assert browser.js("[...document.querySelectorAll('#place-0 > div')].map((part) => part.hidden)") == [True, False]
    choose(browser, "setting", "")
    choose(browser, "split", "validation split")
    assert column(browser, "measured on") == ["validation split"]


def wait_for(browser, condition):
    assert browser.call("Runtime.evaluate", awaitPromise=True, returnByValue=True, expression=f"""
        new Promise((done) => {{ const look = (left) => (({condition}) || !left ? done({condition})
            : setTimeout(look, 20, left - 1)); look(100); }})""")["result"]["value"]  # fmt: skip


def row_of(model, seed):
    """JavaScript for the row of a run."""
    return (
        f"""document.querySelector('#runs [aria-label^="choose seq-mnist, {model},"][aria-label*="seed {seed}"]')"""
        + (".closest('tr')")
    )


def test_a_run_is_opened_and_closed_by_the_keyboard(opened):
    browser = opened()
    browser.js(f"{row_of('gdumb', 0)}.querySelector('button').focus()")
    browser.press("Enter", 13, "\r")
    panel = browser.js("document.getElementById('panel').open && document.getElementById('panel').innerText")
    for text in (
        "gdumb",
        "final_average_accuracy\t70.00\t90.00",
        "rho\t0.05\targv",
        "packages torch\t2.0",
        "flags at their defaults",
        HOSTILE[:36],
    ):
        assert text in panel, text
    assert browser.js("document.querySelector('#panel pre').textContent") == HOSTILE
    tasks = browser.js("[...document.querySelectorAll('#panel [aria-label=Tasks] tr')].map((row) => row.innerText)")
    assert tasks == ["task\tclasses\ttrain rows\ttest rows", "1\t1\t5\t2", "2\t0\t6\t3"]
    assert browser.js("document.querySelectorAll('img').length") == 0
    browser.press("Escape", 27)
    assert browser.js("document.getElementById('panel').open") is False
    assert browser.js(f"document.activeElement === {row_of('gdumb', 0)}.querySelector('button')")


def test_two_runs_are_compared(opened):
    browser = opened()
    assert browser.js("document.getElementById('chosen').hidden")
    for model, seed in (("sgd", 1), ("er", 0), ("derpp", 0)):  # the first of three is let go
        browser.js(f"{row_of(model, seed)}.querySelector('input').click()")
    assert browser.js("document.querySelectorAll('#runs input:checked').length") == 2
    browser.js("document.getElementById('compare').click()")
    rows = browser.js("[...document.querySelectorAll('#panel tbody tr')].map((row) => row.innerText)")
    assert rows == [
        "model\ter (argv)\tderpp (argv)",
        "buffer_size\t200 (argv)\t1000 (argv)",
        "alpha\tnot there\t0.5 (argv)",
        "code models/er.py\t12ab\tnot there",
        "code models/derpp.py\tnot there\t12ab",
        "class-il: final_average_accuracy\t80.00\t50.00",
    ]


def test_files_of_other_shapes_are_shown_as_they_are(browser, tmp_path):
    folders = [make_run(tmp_path / WHERE, seed=seed) for seed in range(5)]
    (folders[0] / "environment.json").write_text('[1, {"__proto__": [2, null]}, "three"]')
    (folders[1] / "benchmark.json").write_text('{"tasks": [1, {"classes": {}}], "class_order": null}')
    (folders[2] / "benchmark.json").write_text('"word"')
    (folders[3] / "environment.json").write_text("null")
    (folders[4] / "config.json").unlink()
    summary = json.loads((folders[4] / "summary.json").read_text())
    summary["metrics"]["class-il"]["__proto__"] = None
    (folders[4] / "summary.json").write_text(json.dumps({**summary, "cost": {}, "setting": 7, "notes": 8}))
    (tmp_path / "page.html").write_text(built(tmp_path / WHERE), encoding="utf-8")
    del browser.problems[:]
    browser.open(tmp_path / "page.html")
    assert sorted(column(browser, "measured on")) == ["split not known", *["test split"] * 4]
    for number in range(5):
        browser.js(f"document.querySelectorAll('#runs button.link')[{number}].click()")
        assert browser.js("document.getElementById('panel').innerText.includes('End of the log')")
        browser.js("document.getElementById('panel').close()")
        browser.js(f"document.querySelectorAll('#runs tbody input')[{number}].click()")
        browser.js("document.getElementById('compare')?.click(); document.getElementById('panel').close()")
    assert browser.problems == []


def test_a_phone_scrolls_tables_in_their_boxes(opened):
    browser = opened()
    browser.show(390, 844)
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.js(
        "(() => { const box = document.querySelector('#runs .box'); return box.scrollWidth > box.clientWidth; })()"
    )


def test_a_phone_scrolls_pictures_instead_of_shrinking_their_text(opened):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="504pt" height="200pt"><rect width="9" height="9"/></svg>'
    browser = opened(figures={"A wide picture with a caption that is longer than the screen of a phone is wide": svg})
    assert browser.js("document.querySelector('figure img').clientWidth") >= 504 * 96 / 72, "not changed on a desk"
    browser.show(390, 844)
    wait_for(browser, "document.querySelector('figure img').offsetWidth >= 600")
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.js(
        "(() => { const box = document.querySelector('figure'); return box.scrollWidth > box.clientWidth; })()"
    )
    assert browser.js("document.querySelector('figcaption').getBoundingClientRect().right") <= 390


def test_pictures_are_shown_and_their_scripts_do_not_run(opened):
    drawn = '<script>alert(1)</script><rect width="9" height="9" style="opacity: 0.5" onload="alert(2)"/>'
    style = "<style>rect {fill: red}</style>"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="300" height="200">{style}{drawn}</svg>'
    browser = opened(figures={"Accuracy & more": svg})
    wait_for(browser, "document.querySelector('figure img').naturalWidth === 300")
    assert browser.js("document.querySelector('nav a[href=\"#picture-1\"]').textContent") == "Accuracy & more"
    assert browser.js("document.getElementById('picture-1').innerText").strip() == "Accuracy & more"


def test_many_rows_come_in_parts_and_all_groups_are_printed(browser, tmp_path):
    lines = []
    for number in range(205):
        flags = {"model": "er", "dataset": "seq-mnist", "optimizer": "sgd", "buffer_size": number, "seed": 0}
        entries = {name: {"value": value, "origin": "argv"} for name, value in flags.items()}
        metrics = {"class-il": {"final_average_accuracy": number / 1000, "forgetting_chaudhry18": 0.1}}
        summary = {
            **flags,
            "status": "finished",
            "setting": "class-il",
            "metrics": metrics,
            "config_hash": f"{number:012x}",
        }
        lines.append(json.dumps({"folder": f"{number}", "summary": summary, "config": {"flags": entries}}))
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    (tmp_path / "page.html").write_text(built(tmp_path), encoding="utf-8")
    del browser.problems[:]
    browser.open(tmp_path / "page.html")
    assert len(column(browser, "seed")) == len(column(browser, "n", "#place-0")) == 200
    browser.js("document.querySelector('#runs .more button').click()")
    assert len(column(browser, "seed")) == 205
    browser.pdf(tmp_path / "page.pdf")
    assert len(column(browser, "n", "#place-0")) == 205
    assert browser.problems == []
