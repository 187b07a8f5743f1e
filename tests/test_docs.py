"""The pages say what is the case: links, tables of results and names, pictures; and the site builds."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from docs import pictures, tables
from flatcl.__main__ import COMMANDS
from flatcl.utils.registry import DATASETS, METHODS, OPTIMIZERS, REGISTRIES, ROOT, parts
from flatcl.utils.reports import plots

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *tables.PAGES]
SETTINGS = ("class-il", "domain-il", "general-continual")


def prose(text):
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text):
    """The anchors of a page's headings, as the site and code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def rows_of(page):
    """{name: cells} of the rows whose first cell is a name."""
    text = (ROOT / "docs" / page).read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", text, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        assert not link.startswith("http"), f"{link}: pages need no network"
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        if page in tables.PAGES:
            assert target.parent.samefile(page.parent), f"{link}: the site has the pages alone"
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_test_of_links_sees_what_is_broken():
    assert anchors("# One `two`\n```\n# no heading\n```\n## Rho and guide: x") == {"one-two", "rho-and-guide-x"}
    assert re.findall(r"\]\(([^)\s]+)\)", prose("[a](b.md#c) `[d](e)`")) == ["b.md#c"]


def test_each_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": (\w+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in tables.PAGES)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_records(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("FLATCL_DATA", raising=False)
    text = page.read_text()
    assert text.count("<!-- flatcl ") == text.count("<!-- end -->")
    assert tables.filled(text) == text, "run: python -m docs.tables"


def test_a_table_is_made_anew_and_a_wrong_command_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = "before\n<!-- flatcl report tests/records/mnistmlp --where model=er -->\nold\n<!-- end -->\nafter\n"
    made = tables.filled(page)
    assert "old" not in made and "| er |" in made
    assert made.startswith("before\n<!-- flatcl") and made.endswith("<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="flatcl report nowhere: it ended with 2"):
        tables.filled(page.replace("tests/records/mnistmlp --where model=er", "nowhere"))


def test_what_the_results_say_about_agreement_is_counted():
    text = (ROOT / "docs/results.md").read_text()
    verdicts = re.findall(
        r"^\| \w+ \| .* \| (agrees|differs \([+-]\)|protocol differs) \| [\d,]+ \|$", text, re.MULTILINE
    )
    agree, other = verdicts.count("agrees"), verdicts.count("protocol differs")
    said = re.search(r"Of (\d+) figures (\d+) agree, (\d+) differ, and (\w+) have another protocol", text).groups()
    assert said == (str(len(verdicts)), str(agree), str(len(verdicts) - agree - other), {6: "six"}[other])


def test_the_table_of_methods_is_that_of_the_registry():
    rows = rows_of("methods.md")
    assert list(rows) and sorted(rows) == METHODS.names()
    for name, (_, settings, _) in rows.items():
        own = METHODS.load(name).settings
        assert settings == ("all" if set(own) == set(SETTINGS) else ", ".join(own)), name


def test_the_table_of_benchmarks_is_that_of_the_registry():
    rows = {name: cells for name, cells in rows_of("benchmarks.md").items() if len(cells) == 4}
    assert sorted(rows) == DATASETS.names()
    for name, (setting, tasks, protocol, _) in rows.items():
        benchmark = DATASETS.load(name)
        defaults = benchmark.defaults or DATASETS.load(benchmark.published_as).defaults
        number = "one" if setting == "general-continual" else str(defaults.get("n_tasks", ""))
        assert setting == benchmark.setting and re.match(rf"{number}\b|as|one", tasks), name
        assert re.match(rf"{defaults['n_epochs']} (epoch|pass)", protocol), name
        assert re.search(rf"batch {defaults['batch_size']}\b", protocol), name


def test_the_measured_columns_of_optimizers_are_those_of_the_record():
    record = (ROOT / "tests/records/bench/README.md").read_text()
    heads = ("perm-mnist, mnistmlp, er: a step of each", "seq-cifar10, reduced-resnet18, er: a step of each")
    blocks = [record.split(head, 1)[1].split("\n\n", 1)[0].splitlines()[2:] for head in heads]
    measured = [{line.split()[0]: line.split()[2:4] for line in block} for block in blocks]
    rows = {name: cells for name, cells in rows_of("optimizers.md").items() if len(cells) == 6}
    assert set(rows) == set(OPTIMIZERS.names())
    for name, cells in rows.items():
        (small, ideal), (large, _) = (factors[name] for factors in measured)
        assert cells[-3:] == [ideal, small, large], name


def test_the_pictures_can_be_drawn(tmp_path):
    own = pictures.results("perm-mnist", "domain-il")
    assert list(own) == list(pictures.METHODS) and all(set(part) == set(OPTIMIZERS.names()) for part in own.values())
    step = pictures.one_step()
    assert [len(images) for images in step["blocks"]] == [10, 10, 10]
    assert sum(step["perturbed"].values()) > sum(step["clean"].values()), "the perturbation does not increase the loss"
    for figure in (pictures.overview(), pictures.step_picture()):
        pictures.save(figure, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_pictures_of_results_are_those_of_the_records(tmp_path):
    page = (ROOT / "docs/results.md").read_text()
    for name, figure in pictures.of_records().items():
        plots.save(figure, str(tmp_path / name))
        made, kept = (folder / name for folder in (tmp_path, ROOT / "docs"))
        texts, versions = zip(*map(read_svg, (made, kept)), strict=True)
        assert texts[0] == texts[1], "run: python -m docs.pictures"
        assert versions[0] != versions[1] or made.read_bytes() == kept.read_bytes(), "run: python -m docs.pictures"
        assert f"]({name})" in page


def read_svg(file):
    """(the texts of a picture, the version of matplotlib that drew it)."""
    text = file.read_text()
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", text)
    assert len(texts) > 10
    return texts, re.search(r"Matplotlib v([\w.]+)", text)[1]


def test_the_site_builds_and_fetches_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    built = {page.stem for page in tmp_path.glob("*.html")}
    runs = (tmp_path / "records.html").read_text()
    assert runs.count("<figure ") > 5 and all(str(ROOT) not in text for text in (runs, runs.replace("\\/", "/")))
    assert '<a href="records.html">' in (tmp_path / "results.html").read_text()
    assert built >= {page.stem for page in tables.PAGES}
    for page in tmp_path.glob("*.html"):
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:)?//", page.read_text())
        assert not fetched, page.name
    assert not list(tmp_path.rglob("*.py"))


def test_the_citation_can_be_read():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(content)
    assert content["license"] == "MIT" and "2405.09492" in json.dumps(content["references"])


def test_the_readme_names_and_counts_all_that_can_be_chosen():
    text = (ROOT / "README.md").read_text()
    for registry in REGISTRIES:
        missing = [name for name in registry.names() if f"`{name}`" not in text]
        assert not missing, f"{registry.kind}: {missing}"
    page = (ROOT / "docs/install.md").read_text()
    for command in parts(COMMANDS):
        assert f"`{command}`" in text and f"`flatcl {command}" in page, command
    counts = {"methods": METHODS, "optimizers": OPTIMIZERS, "benchmarks": DATASETS}
    for page in (text, (ROOT / "docs/index.md").read_text()):
        for number, what in re.findall(r"\b(\d+) (methods|optimizers|benchmarks)\b", page):
            assert int(number) == len(counts[what].names()), what
