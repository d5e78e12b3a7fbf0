"""The page of a report: every figure has its sentence and its numbers, names are not markup, and nothing is loaded from elsewhere."""

import copy
import re
import struct
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="pip install 'hf_disparse[plot]'")

from hf_disparse import UserError
from hf_disparse.report import page, sentences, theme
from hf_disparse.report.figures import figures_of
from hf_disparse.report.values import SPEED_HEADER, blocks, speed_rows
from hf_disparse.report.write import require_libraries, write_comparison, write_report
from tests.helpers.analyses import analysis, comparison

TASKS = ["topic", "sentiment", "question"]
VOID = {"meta", "link", "br", "img", "input"}


@dataclass
class Section:
    title: str = ""
    caption: str = ""
    labels: list = field(default_factory=list)
    header: list = field(default_factory=list)
    rows: list = field(default_factory=list)


class Page(HTMLParser):
    """The sections that a reader sees; raises AssertionError if tags are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.sections, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(Section())
        elif tag == "svg":
            self.sections[-1].labels.append(dict(attrs).get("aria-label"))
        elif tag in ("tr", "th", "td") and self.sections:
            if tag == "tr":
                self.sections[-1].rows.append([])
            else:
                (self.sections[-1].header if tag == "th" else self.sections[-1].rows[-1]).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if not self.sections or not self.open:
            return
        section, tag = self.sections[-1], self.open[-1]
        if tag == "h2":
            section.title += data
        elif tag == "figcaption":
            section.caption += data
        elif tag == "th":
            section.header[-1] += data
        elif tag == "td":
            section.rows[-1][-1] += data


def parse(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    values = analysis(TASKS, layers=3, stages=("dense", "sparse"))
    path = write_report(values, tmp_path_factory.mktemp("report") / "new")
    return values, path, parse(path)


def numbers(cells: list) -> list:
    return [float(cell.replace(",", "")) for cell in cells]


def test_every_figure_has_its_title_sentence_description_and_table(written):
    values, _, parsed = written
    assert len(parsed.sections) == len(figures_of(values)) == 9
    for section, figure in zip(parsed.sections, figures_of(values), strict=True):
        assert section.title == figure.title and section.caption == figure.sentence
        assert section.labels == [f"{figure.title}. {figure.sentence}"] * 2  # wide and narrow
        assert section.header == list(figure.header)
        rows = section.rows[1:]  # after the header's
        assert len(rows) == len(figure.rows) > 0 and {len(row) for row in rows} == {len(figure.header)}
    assert parsed.tags.count("h1") == 1 and "h3" not in parsed.tags and ("lang", "en") in parsed.attributes


def test_the_tables_hold_the_numbers_of_the_analysis(written):
    values, _, parsed = written
    tables = {section.title: section.rows[1:] for section in parsed.sections}
    names = {"after dense training": 0, "after sparse training": 1}
    for stage, tasks, layer, *rest in tables["Where tasks agree"]:
        wanted = TASKS if tasks == "all tasks" else tasks.split(" + ")
        (row,) = (
            row
            for row in values["stages"][names[stage]]["agreement"]
            if row["kind"] == "all" and row["layer"] == int(layer) and row["tasks"] == wanted
        )
        keys = ("iou", "chance", "beyond_chance", "low", "high")
        assert numbers(rest) == pytest.approx([row[key] for key in keys], abs=6e-4)
    assert len(tables["Where tasks agree"]) == 2 * 3 * 4
    for stage, layer, *rest in tables["Who keeps what"]:
        rows = values["stages"][names[stage]]["keepers"]
        (row,) = (row for row in rows if row["kind"] == "all" and row["layer"] == int(layer))
        assert numbers(rest) == pytest.approx(row["kept_by"], abs=6e-4)
    for sparsity, recovered, *rest in tables["What sparsity costs"]:
        (point,) = (
            p
            for p in values["curve"]["points"]
            if p["recovered"] == (recovered == "yes") and p["sparsity"] == pytest.approx(float(sparsity), abs=6e-4)
        )
        assert numbers(rest) == pytest.approx([*point["metrics"].values(), point["average"]], abs=6e-4)
    for name, *rest in tables["What is left of the model"]:
        rows = [row for row in values["footprint"] if name in (row["module"], "all")]
        assert numbers(rest) == [sum(row[key] for row in rows) for key in list(rows[0])[1:]]


def test_the_results_of_the_run_are_on_top(tmp_path):
    times = {"1": {"dense": 12.0, "fast": 3.0}, "32": {"dense": 300.0, "fast": 40.0}}
    results = {
        "sparsity": {"target": 0.8, "prunable": 0.8},
        "dense": {"tasks": {"topic": {"accuracy": 91.5, "f1": 90.0}}, "average": 90.75},
        "sparse": {"tasks": {"topic": {"accuracy": 89.0, "f1": 90.25}}, "average": 89.625},
        "speed": {"tokens": 32, "threads": 1, "milliseconds": times, "megabytes": {"dense": 90.0, "fast": 60.0}},
    }
    values = analysis(["a", "b"], layers=1, stages=())
    values["curve"], values["footprint"] = None, []
    for speed in (results["speed"], {"reason": "why"} | results["speed"] | {"milliseconds": {"1": {"dense": 12.0}}}):
        parsed = parse(write_report(values, tmp_path, results | {"speed": speed}))
        metrics, shown = parsed.sections
        assert metrics.header == ["task", "metric", "dense", "sparse", "difference"]
        assert metrics.rows[1:] == [
            ["topic", "accuracy", "91.5", "89.0", "-2.5"],
            ["topic", "f1", "90.0", "90.2", "0.2"],
            ["average", "", "90.8", "89.6", "-1.1"],
        ]
        assert (
            "With 80.0 % of the prunable weights pruned, the tasks average 89.6; dense, they average 90.8."
            in parsed.text
        )
        assert shown.header == list(SPEED_HEADER) and [row[1:] for row in shown.rows[1:]] == [
            ["\N{EN DASH}" if x is None else f"{x:.1f}" for x in row[1:]] for row in speed_rows(speed)
        ]
        assert ("fast=True" in parsed.text) == ("reason" not in speed)
    del results["speed"]  # an earlier version did not measure it
    assert [section.title for section in parse(write_report(values, tmp_path, results)).sections] == [
        "Dense and sparse"
    ]


def test_the_figures_are_there_as_png_and_svg(written):
    values, path, _ = written
    names = {figure.name for figure in figures_of(values)}
    files = {file.name for file in (path.parent / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        head = (path.parent / "figures" / f"{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", head[16:20])[0] == 2 * page.WIDE
        root = ElementTree.parse(path.parent / "figures" / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(written):
    _, path, parsed = written
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|javascript:", text)
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & set(parsed.tags)
    links = [value for key, value in parsed.attributes if key in ("href", "src", "xlink:href", "srcset", "data")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))
    ids = [value for key, value in parsed.attributes if key == "id"]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == "#"} <= set(ids)
    assert "default-src 'none'" in text


def test_no_colour_of_the_theme_is_left_fixed_in_the_page(written):
    """A fixed colour would not change with the theme."""
    drawings = "".join(re.findall(r"<svg.*?</svg>", written[1].read_text(encoding="utf-8"), re.DOTALL))
    assert not [colour for colour in theme.DARK if colour in drawings]
    assert all(f"var({theme.VARIABLE[colour]})" in drawings for colour in (theme.INK, theme.GRID, theme.COLOURS[0]))
    dark = dict(re.findall(r"(--c\d+): (#\w+);", theme.css_variables(dark=True)))
    light = dict(re.findall(r"(--c\d+): (#\w+);", theme.css_variables(dark=False)))
    assert dark.keys() == light.keys() == set(theme.VARIABLE.values()) and not dark.items() & light.items()


def one_figure(values: dict, name: str):
    return next(figure for figure in figures_of(values) if figure.name == name)


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    figure = one_figure(analysis(["a", "b"], layers=2, stages=("dense",)), "agreement")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        page.write_page(tmp_path / name / "report.html", "x", {}, [figure], "analysis.json")
    for file in ("report.html", "figures/agreement.svg", "figures/agreement.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


HOSTILE = ["</title></svg><script>alert(1)</script>", '" onload="alert(1)', "$\\frac{$ & {{ 7 * 7 }} --> ]]>"]


@pytest.mark.slow
def test_names_of_tasks_models_and_methods_are_not_markup(tmp_path):
    values = analysis(HOSTILE, layers=2, stages=("dense",))
    values["model"] = values["criterion"] = HOSTILE[0]
    values["footprint"][0]["module"] = HOSTILE[1]
    pages = [write_report(values, tmp_path), write_comparison(comparison(HOSTILE, (0.8,), HOSTILE), tmp_path)]
    for path in pages:
        parsed = parse(path)
        assert "script" not in parsed.tags and not [key for key, _ in parsed.attributes if key.startswith("on")]
        assert all(name in parsed.text for name in HOSTILE) and "49" not in parsed.text.replace(" ", "").split("}}")
    tables = {section.title: section for section in parse(pages[0]).sections}
    assert set(HOSTILE) <= set(tables["What sparsity costs"].header)
    for file in (tmp_path / "figures").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(file).iter()}
        assert "script" not in tags


def test_with_one_task_the_page_says_that_there_is_no_other(tmp_path):
    values = analysis(["only"], layers=1, stages=("dense",))
    values["curve"], values["footprint"] = None, []
    parsed = parse(write_report(values, tmp_path))
    titles = {section.title: section for section in parsed.sections}
    for title in ("Where tasks agree", "Which tasks are alike"):
        assert not titles[title].labels and not titles[title].rows
    assert parsed.text.count(sentences.ONE_TASK) == 2
    assert titles["Who keeps what"].header == ["stage", "layer", "no task", "the task"]
    assert "What sparsity costs" not in titles and "What is left of the model" not in titles


@pytest.mark.slow
def test_two_hundred_tasks_make_a_page_of_the_extremes(tmp_path):
    path = write_report(analysis([f"task{i}" for i in range(200)], layers=2, stages=("sparse",)), tmp_path)
    sections = {section.title: section for section in parse(path).sections}
    assert len(sections["Where tasks agree"].rows) == 1 + 2 * 3  # all at once, and the two extremes
    assert path.stat().st_size < 3_000_000


def test_a_comparison_has_its_figure_and_all_rows(tmp_path):
    report = comparison(["magnitude", "unanimous"], (0.5, 0.8))
    report["failed"] = {"joint-0.8": "out of memory"}
    (section,) = parse(path := write_comparison(report, tmp_path)).sections
    assert path.name == "compare.html" and "out of memory" in path.read_text()
    assert [row[:2] for row in section.rows[1:]] == [[row["method"], row["criterion"]] for row in report["rows"]]
    for cells, row in zip(section.rows[1:], report["rows"], strict=True):
        average = row["mean"]["average"]
        assert numbers(cells[2:]) == pytest.approx([row["sparsity"], 3, average, 0.6, average, average], abs=6e-4)
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"comparison.png", "comparison.svg"}
    report["rows"][1]["times_as_fast"] = {"1": 4.0, "32": 5.5}  # an earlier version ran the others
    (section,) = parse(write_comparison(report, tmp_path)).sections
    assert section.header[-2:] == ["times as fast, 1 text", "times as fast, 32 texts"]
    assert [row[-2:] for row in section.rows[1:3]] == [["\N{EN DASH}"] * 2, ["4.000", "5.500"]]


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_without_the_extra_one_line_says_what_to_install(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    for call in (require_libraries, lambda: write_report(analysis(["a", "b"]), tmp_path)):
        with pytest.raises(UserError, match=r'pip install "hf_disparse\[plot\]"') as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# Sentences, on planted truths

STAGE = analysis(TASKS, layers=6, stages=("sparse",))["stages"][0]


def changed(stage: dict, **values) -> dict:
    """Copies the stage with other values in all tasks' rows of whole layers; a list has one value per layer."""
    stage = copy.deepcopy(stage)
    for row in stage["agreement"]:
        if row["kind"] == "all" and len(row["tasks"]) == 3:
            row |= {key: v[row["layer"]] if isinstance(v, list) else v for key, v in values.items()}
    return stage


def test_the_sentence_names_the_layers_that_agree_most_and_least_and_the_watershed():
    text = sentences.agreement_sentence([changed(STAGE, beyond_chance=[0.5, 0.9, 0.5, 0.5, 0.1, 0.5])])
    assert "all 3 tasks agree most in layer 1 (0.90" in text and "least in layer 4 (0.10" in text
    assert "is layer 3 (2 to 3) after sparse training, in 97 % of the bootstrap samples." in text


def test_the_sentence_says_so_if_there_is_nothing_to_see():
    text = sentences.agreement_sentence([changed(STAGE, beyond_chance=0.01, low=-0.02, high=0.03)])
    assert "differs from chance" in text and "agree most" not in text
    text = sentences.agreement_sentence(
        [changed(STAGE, beyond_chance=[0.5, 0.52, 0.5, 0.49, 0.5, 0.5], low=0.4, high=0.6)]
    )
    assert "may not differ" in text
    none = {**STAGE, "watershed": {"layer": None, "low": None, "high": None, "share": 0.1}}
    assert "There is no watershed" in sentences.agreement_sentence([none])
    some = {**STAGE, "watershed": STAGE["watershed"] | {"share": 0.6}}
    text = sentences.agreement_sentence([none | {"name": "dense"}, some])
    assert "in 60 % of the bootstrap samples; there is none after dense training." in text
    assert "do not read much into it" in sentences.agreement_by_kind_sentence([STAGE])


def test_kinds_pairs_and_heads_are_named():
    stage = copy.deepcopy(STAGE)
    for row in stage["agreement"]:
        row["beyond_chance"] = {"key": 0.9, "down": 0.1}.get(row["kind"], 0.5)
    assert (
        "agree most on the key matrices (0.90) and least on the down matrices (0.10)."
        in sentences.agreement_by_kind_sentence([stage])
    )
    stage["affinity"]["gradient_cosine"] = [[1, 0.2, -0.3], [0.2, 1, 0.4], [-0.3, 0.4, 1]]
    text = sentences.affinity_sentence(stage, TASKS)
    assert (
        "sentiment and question have the most similar gradients (0.40), topic and question the least similar (-0.30)"
        in text
    )
    assert "1 of 3 pairs point in opposing directions" in text
    stage["parts"] = [{"layer": 0, "granularity": "head", "heads": [TASKS, ["topic"], ["topic"], [], TASKS[:2]]}]
    text = sentences.heads_sentence(stage, TASKS)
    assert "of 5 heads, all tasks keep 1, one task alone keeps 2 and no task keeps 1." in text
    assert "topic has the most heads to itself (2)" in text


def test_the_cost_sentence_follows_from_the_points():
    text = sentences.cost_sentence(analysis(TASKS)["curve"])
    assert "knee at 80 % pruned" in text and "Up to 80 % pruned, no task loses more than 2 points." in text
    assert "question loses most" in text and "topic least" in text and "further training changes the average by" in text
    curve = analysis(TASKS)["curve"] | {
        "knee": dict.fromkeys([*TASKS, "average"]),
        "within": {"points": 1, "sparsity": None},
    }
    text = sentences.cost_sentence(curve)
    assert "no knee" in text and "At every sparsity tried, some task loses more than 1 point." in text


def test_a_lead_within_the_spread_is_called_chance():
    rows = comparison(["unanimous", "magnitude"], (0.8,))["rows"]
    text = sentences.comparison_sentence(rows)
    assert "unanimous disparse has the highest average (83.9), -6.1 points" in text and "more than one standard" in text
    rows[1]["spread"]["average"] = 1.5
    assert "may be chance" in sentences.comparison_sentence(rows)
    assert "one seed each" in sentences.comparison_sentence(comparison(["a", "b"], (0.8,), seeds=(1,))["rows"])


def test_modules_are_summed_by_layer():
    names = [
        "encoder.embeddings.word",
        "encoder.embeddings.norm",
        "encoder.layer.0.a",
        "encoder.layer.0.b.c",
        "heads.topic.out",
    ]
    summed = blocks([{"module": name, "parameters": 10**i} for i, name in enumerate(names)])
    assert [(row["module"], row["parameters"]) for row in summed] == [
        ("encoder.embeddings", 11),
        ("layer 0", 1100),
        ("heads.topic", 10000),
    ]
