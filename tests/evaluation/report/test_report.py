"""The report of a comparison: every figure reads back, panels follow the measures, everyone can read it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from stride_captum.evaluation import (
    Comparison,
    Cost,
    compare,
    counterfactual,
    lds,
    leakage,
    linearized_influence_correlation,
    load_task,
    mislabel,
)
from stride_captum.evaluation.cli.app import app
from stride_captum.evaluation.comparison.runs.counterfactual import CounterfactualRow
from stride_captum.evaluation.comparison.runs.lds import Row
from stride_captum.evaluation.comparison.runs.leakage import LeakageRow
from stride_captum.evaluation.comparison.runs.mislabel import MislabelRow
from stride_captum.evaluation.comparison.shared.gallery import Gallery, choose_points
from stride_captum.evaluation.comparison.shared.suspects import most_suspect
from stride_captum.evaluation.measures.calibration import calibration, calibration_of_removals
from stride_captum.evaluation.measures.counterfactual_difference import difference as drop_difference
from stride_captum.evaluation.measures.counterfactual_difference import difference_at_equal_depletion
from stride_captum.evaluation.measures.linear_datamodeling import difference
from stride_captum.evaluation.report.drawing import N_SERIES
from stride_captum.evaluation.report.figures import counterfactual_curves, spread
from stride_captum.evaluation.report.html import comparison_table, pointer, read_results, write_comparison
from stride_captum.evaluation.report.pictures import picture
from stride_captum.evaluation.report.terminal import console, show_comparison
from stride_captum.evaluation.system.environment import describe
from stride_captum.evaluation.tasks.networks import DIGITS_TRAINING
from stride_captum.evaluation.tasks.task import Task
from stride_captum.subsets import random_subsets

runner = CliRunner()
TEMPLATES = resources.files("stride_captum.evaluation.report") / "templates"
SCHEMA = json.loads((TEMPLATES / "results.schema.json").read_text(encoding="utf-8"))
NAMES = ("STRIDE", "ClassRandom", "Similarity", "<b>Other</b>, out-of-sample residuals")
N_TRAIN, N_TEST, N_CLASSES = 40, 8, 3


def tiny_task(images=True):
    rng = torch.Generator().manual_seed(0)
    shape = (1, 6, 6) if images else (5,)
    x = torch.rand(N_TRAIN + N_TEST, *shape, generator=rng)
    y = torch.arange(N_TRAIN + N_TEST) % N_CLASSES
    return Task(
        name="tiny <images>",
        train=TensorDataset(x[:N_TRAIN], y[:N_TRAIN]),
        test=TensorDataset(x[N_TRAIN:], y[N_TRAIN:]),
        build_model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), N_CLASSES)),
        training=DIGITS_TRAINING,
    )


class Scored:
    """Stands for a method whose answers are kept."""

    has_own_mislabel_scores = False

    def __init__(self, seed):
        self.scores = torch.from_numpy(np.random.default_rng(seed).normal(size=(N_TEST, N_TRAIN)))

    def ask(self, what, about, compute):
        assert what == "mislabel scores"
        return SimpleNamespace(values=compute(self).numpy())

    def mislabel_scores(self):
        return self.scores[0].abs()


def comparison(*, images=True, n_resamples=40, constant=False):
    """A full comparison of made-up scores; `constant`: the third method says nothing at all."""
    rng = np.random.default_rng(0)
    task, models = tiny_task(images), ["seed 0", "seed 1/spiked"]
    membership = random_subsets(N_TRAIN, 10, N_TRAIN // 2, seed=0)
    effects = rng.normal(size=(N_TEST, N_TRAIN))
    responses = membership @ effects.T + rng.normal(size=(3, 10, N_TEST))
    labels = task.train.tensors[1].numpy()
    gallery = Gallery(task, {models[0]: task.build_model()}, range(2, N_TEST), rank_suspects=False)
    rows, drops, finds, leaks = [], [], [], []
    flipped = rng.random((2, N_TRAIN)) < 0.2
    for m, name in enumerate(NAMES):
        silent = constant and m == 2
        scores = [
            np.zeros_like(effects) if silent else effects + m * rng.normal(size=effects.shape) for _ in models
        ]
        found = lds(scores, membership, responses, n_resamples=n_resamples)
        gap = difference(rows[0].lds, found) if rows else None
        cost = Cost(
            fit_seconds=0.01 * 4**m,
            query_seconds=0.1,
            n_queries=N_TEST,
            forward_seconds=0.02,
            peak_bytes=None if m else 1 << 20,
        )
        rows.append(
            Row(
                name=name,
                options={"damping": 0.1, "residuals": "both"} if m == 3 else {},
                lds=found,
                models=models,
                against_first=(gap.value, gap.interval) if gap else None,
                cost=cost,
                calibration=calibration(scores, membership, responses, n_resamples=n_resamples),
                linearized=linearized_influence_correlation(scores, membership, responses)
                if not silent
                else None,
            )
        )
        gallery.add(name, Scored(m), Scored(m).scores[2:].numpy())
        for opponents in (False, True):
            whole = rng.uniform(0.6, 0.9, size=(3, N_TEST))
            without = np.clip(whole - rng.uniform(0, 0.3, size=(2, 2, 3, N_TEST)), 0, 1)
            shares = np.sort(rng.random((2, 2, N_TEST)), axis=1) * 0.6
            result = counterfactual(
                whole, without, shares, counts=(4, 12), opponents=opponents, n_resamples=n_resamples
            )
            changes = rng.normal(size=(2, 2, 3, N_TEST))
            fit = calibration_of_removals(changes.mean(2), changes, n_resamples=n_resamples)
            other = next(
                (d.result for d in drops if d.name == "ClassRandom" and d.result.opponents is opponents), None
            )
            plain = drop_difference(result, other, n_resamples=n_resamples) if other else None
            equal = (
                difference_at_equal_depletion(result, other, n_resamples=n_resamples)
                if other and not opponents
                else None
            )
            drops.append(CounterfactualRow(name, result, plain, equal, fit, cost))
        for ranking in ("self-influence", "held-out influence"):
            flags = flipped + rng.normal(size=flipped.shape) * (1 + m)
            finds.append(
                MislabelRow(
                    name=name,
                    ranking=ranking,
                    uses_influence=True,
                    result=mislabel(list(flags), flipped, n_resamples=n_resamples),
                    fit_seconds=0.1,
                    ranking_seconds=0.2,
                    suspects=most_suspect(
                        flags[0], labels, np.where(flipped[0], (labels + 1) % N_CLASSES, labels)
                    ),
                )
            )
        for way in (None, "cosine") if m else (None,):
            for n in (1, 4):
                where = leakage(
                    rng.normal(size=(n, N_TRAIN)), np.arange(n), ks=(1, n), n_resamples=n_resamples
                )
                leaks.append(LeakageRow(name, "exact", n, way, where, cost))
    flags = flipped + rng.normal(size=flipped.shape)
    finds.append(
        MislabelRow("loss", "detector", False, mislabel(list(flags), flipped, n_resamples=0), 0.0, 0.1)
    )
    for row in finds:
        gallery.add_flips(row.name, row.ranking, row.suspects)
    protocol = {
        "n_train": N_TRAIN, "n_subsets": 10, "subset_size": N_TRAIN // 2, "n_seeds": 3, "n_test_tuning": 2,
        "n_test_reported": N_TEST, "response": "margin of the true class",
        "options": {name: {} for name in NAMES},
        "models": dict.fromkeys(models, 0.01), "n_resamples": n_resamples,
        "measures": {"mislabel": {"rate": 0.2}}, "training": {"epochs": 3},
        "fingerprints": {"task": "f" * 24, "models": dict.fromkeys(models, "e" * 64)},
    }  # fmt: skip
    return Comparison(
        task.name, "A note.", rows, protocol, describe(), drops, finds, leaks,
        skipped={"EKFAC": "needs kronfluence"}, gallery=gallery.to_dict(),
    )  # fmt: skip


@cache
def full():
    return comparison()


@pytest.fixture(scope="module")
def results():
    return json.loads(json.dumps(full().to_dict(), allow_nan=False))


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    return write_comparison(results, tmp_path_factory.mktemp("report") / "report.html")


class Page(HTMLParser):
    """Elements of a page in their order: tag, attributes, the text inside, and the enclosing tags."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **dict(attrs)}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open[-1]["tag"] == tag, (tag, self.open[-1])
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [e for e in self.elements if e["tag"] in tags]


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page.read_text(encoding="utf-8"))


def resolve(results, path):
    for key in path.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        results = results[int(key)] if isinstance(results, list) else results[key]
    return results


# What is in results.json.


class TestSchema:
    def test_it_is_a_schema_that_describes_every_field(self):
        jsonschema.Draft202012Validator.check_schema(SCHEMA)

        def fields(node):
            if isinstance(node, dict):
                yield from (node.get("properties") or {}).items()
                for inner in node.values():
                    yield from fields(inner)
            elif isinstance(node, list):
                for inner in node:
                    yield from fields(inner)

        found = list(fields(SCHEMA))
        assert len(found) > 100
        silent = [name for name, field in found if "description" not in field and "$ref" not in field]
        assert set(silent) <= {"train", "test"} - {n for n, f in found if "description" in f}

    @pytest.mark.slow
    def test_a_full_result_conforms(self, results):
        jsonschema.validate(results, SCHEMA)
        jsonschema.validate({"command": ["stride-captum", "compare"], **results}, SCHEMA)

    @pytest.mark.slow
    @pytest.mark.parametrize("images", [True, False])
    def test_undefined_figures_conform_and_are_json(self, images):
        found = comparison(images=images, n_resamples=0, constant=True).to_dict()
        assert found["rows"][2]["lds"]["value"] is None
        assert found["rows"][2]["first_row_less_this"]["value"] is None
        jsonschema.validate(json.loads(json.dumps(found, allow_nan=False)), SCHEMA)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "path", [("rows", 0, "lds", "value"), ("format",), ("gallery",), ("rows", 1, "cost")]
    )
    def test_a_missing_figure_does_not_conform(self, results, path):
        broken = json.loads(json.dumps(results))
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(jsonschema.ValidationError, match=f"'{path[-1]}' is a required property"):
            jsonschema.validate(broken, SCHEMA)

    def test_it_is_installed_with_the_package(self):
        project = (resources.files("stride_captum") / "../pyproject.toml").read_text(encoding="utf-8")
        assert '"templates/*.json"' in project
        assert '"templates/*.j2"' in project


# What is in the page.


class TestFigures:
    @pytest.mark.slow
    def test_every_marked_figure_is_the_one_in_results(self, results, parsed):
        marked = [e for e in parsed.elements if "data-value" in e]
        assert len(marked) > 300
        for element in marked:
            assert json.loads(element["data-value"]) == resolve(results, element["data-path"])
            assert element["text"].strip()

    @pytest.mark.slow
    def test_shown_figures_are_roundings_of_their_values(self, parsed):
        for element in parsed.all("span"):
            value = json.loads(element.get("data-value", "null"))
            text = element["text"].replace("\u2212", "-").replace(",", "").rstrip("%")
            if isinstance(value, float) and not element["data-path"].endswith("peak_bytes"):
                shown = float(text) / (100 if "%" in element["text"] else 1)
                assert shown == pytest.approx(value, rel=0.006, abs=0.006)

    @pytest.mark.slow
    def test_every_figure_of_every_measure_is_shown(self, results, parsed):
        shown = {e["data-path"] for e in parsed.elements if "data-value" in e}
        expected = set()
        for i, row in enumerate(results["rows"]):
            for part, names in {
                "lds": ("value", "worst", "undefined"),
                "cost": ("fit_seconds", "query_seconds", "fit_ratio", "query_ratio", "peak_bytes"),
                "calibration": ("slope", "r2", "r2_as_predicted"),
                "linearized": ("spearman", "pearson", "ceiling"),
            }.items():
                expected |= {f"/rows/{i}/{part}/{name}" for name in names}
            for part in ("lds", "calibration", "linearized"):
                expected |= {f"/rows/{i}/{part}/interval/{end}" for end in ("low", "high")}
                expected |= {f"/rows/{i}/{part}/per_model/{j}" for j in range(len(row["models"]))}
            expected |= {f"/rows/{i}/first_row_less_this/interval/{j}" for j in range(2) if i}
        for i, row in enumerate(results["counterfactual"]):
            for c in range(2):
                expected |= {f"/counterfactual/{i}/result/{name}/{c}" for name in ("drop", "depletion")}
                expected |= {f"/counterfactual/{i}/result/intervals/{c}/{end}" for end in ("low", "high")}
                if row["at_equal_depletion"]:
                    expected.add(f"/counterfactual/{i}/at_equal_depletion/value/{c}")
            expected.add(f"/counterfactual/{i}/calibration/slope")
        for i in range(len(results["mislabel"])):
            expected |= {f"/mislabel/{i}/result/{name}" for name in ("precision", "average_precision", "auc")}
        for i in range(len(results["leakage"])):
            expected |= {f"/leakage/{i}/result/{name}" for name in ("mean_rank", "median_rank", "top1")}
        for name, residual in results["protocol"]["models"].items():
            expected.add(pointer(["protocol", "models", name]))
            assert residual == 0.01
        assert expected <= shown

    @pytest.mark.slow
    def test_the_summary_comes_first_and_word_for_word(self, results, parsed):
        sentences = [e["text"] for e in parsed.all("p") if e.get("data-path", "").startswith("/summary/")]
        assert sentences == results["summary"]
        headings = [e.get("id") for e in parsed.all("h2")]
        assert headings[0] == "summary"

    def test_what_is_not_influence_is_marked(self, results, parsed):
        tables = [e for e in parsed.all("span") if e.get("class") == "mark" and "td" in e["inside"]]
        assert len(tables) == sum(not row["uses_influence"] for row in results["mislabel"])

    @pytest.mark.slow
    @pytest.mark.parametrize("images", [True, False])
    def test_undefined_figures_are_dashes(self, images, tmp_path):
        found = comparison(images=images, n_resamples=0, constant=True).to_dict()
        del found["counterfactual"][2:]
        html = write_comparison(found, tmp_path / "report.html").read_text(encoding="utf-8")
        undefined = [e for e in Page(html).elements if e.get("data-value") == "null" and e["tag"] == "span"]
        assert "/rows/2/lds/value" in {e["data-path"] for e in undefined}
        for element in undefined:
            assert element["text"] == "\u2013"

    @pytest.mark.slow
    def test_names_cannot_break_out_of_the_page(self, page):
        html = page.read_text(encoding="utf-8")
        assert "<b>Other" not in html
        assert "&lt;b&gt;Other" in html

    def test_the_notebook_shows_summary_and_main_table(self, results):
        html = full()._repr_html_()
        assert html == comparison_table(full().to_dict())
        shown = {e["data-path"] for e in Page(html).elements if "data-path" in e}
        assert {"/summary/0", *(f"/rows/{i}/lds/value" for i in range(len(NAMES)))} <= shown


class TestPanels:
    PANELS = ("counterfactual", "mislabel", "leakage", "calibration", "linearized", "gallery", "skipped")

    @staticmethod
    def ids(found, path):
        html = write_comparison(found, path / "report.html").read_text(encoding="utf-8")
        return {e.get("id") for e in Page(html).all("h2", "h3")}

    def test_all_are_there_where_all_was_measured(self, parsed):
        assert {*self.PANELS, "proponents", "opponents"} <= {e.get("id") for e in parsed.all("h2", "h3")}

    @pytest.mark.slow
    @pytest.mark.parametrize("panel", PANELS)
    def test_a_measure_that_was_not_taken_leaves_no_trace(self, panel, results, tmp_path):
        without = json.loads(json.dumps({**results, "counterfactual": results["counterfactual"][:1]}))
        if panel in ("calibration", "linearized"):
            for row in without["rows"]:
                row[panel] = None
        else:
            without[panel] = {"gallery": None, "skipped": {}}.get(panel, [])
        found = self.ids(without, tmp_path)
        assert panel not in found
        others = set(self.PANELS) - {panel}
        assert others <= found

    @pytest.mark.slow
    def test_one_arm_is_shown_alone(self, results, tmp_path):
        one = [row for row in results["counterfactual"] if row["result"]["opponents"]][:1]
        found = self.ids({**results, "counterfactual": one}, tmp_path)
        assert "opponents" in found
        assert "proponents" not in found

    @pytest.mark.slow
    def test_printed_figures_of_the_paper_stand_apart(self, results, tmp_path):
        paper = {
            "number": 8, "title": "Mislabels", "task": "mnist", "measure": "mislabel", "columns": ["P"],
            "printed": {"STRIDE": [".921"]}, "methods": ["STRIDE"], "settings": {}, "differs": "Nothing.",
        }  # fmt: skip
        jsonschema.validate({**results, "paper": paper}, SCHEMA)
        assert "paper" in self.ids({**results, "paper": paper, "counterfactual": []}, tmp_path)


class TestRebuilding:
    @pytest.mark.slow
    def test_from_the_file_it_is_the_same_page(self, results, page, tmp_path):
        (tmp_path / "results.json").write_text(json.dumps(results))
        done = runner.invoke(app, ["report", str(tmp_path / "results.json")])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "report.html").read_bytes() == page.read_bytes()

    @pytest.mark.slow
    def test_elsewhere(self, results, tmp_path):
        (tmp_path / "results.json").write_text(json.dumps({**results, "counterfactual": []}))
        out = tmp_path / "new" / "page.html"
        done = runner.invoke(app, ["report", str(tmp_path / "results.json"), "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert out.exists()
        assert not (tmp_path / "report.html").exists()

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (None, r"No such file"),
            (
                "{",
                r"`results` must be a results.json of `stride-captum compare`; got .*Expecting property name",
            ),
            ("[]", r"`results` must be the results of `compare` in format 1; got .* with format None"),
            ('{"format": 2}', r"with format 2\. Run `stride-captum compare` again"),
        ],
    )
    def test_other_files_get_one_sentence(self, content, sentence, tmp_path):
        path = tmp_path / "results.json"
        if content is not None:
            path.write_text(content)
        done = runner.invoke(app, ["report", str(path)])
        assert done.exit_code == 2
        assert re.search(sentence, done.stderr)

    def test_read_results_and_write_comparison_raise(self, tmp_path):
        (tmp_path / "a.json").write_text("nothing")
        with pytest.raises(ValueError, match=r"`results` must be a results.json"):
            read_results(tmp_path / "a.json")
        with pytest.raises(ValueError, match=r"`results` must be the results of `compare` in format 1"):
            write_comparison({}, tmp_path / "a.html")


# Everyone can read it.


def luminance(color):
    """Relative luminance as WCAG 2 defines it."""
    digits = color.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * c for c in digits)
    channels = np.frombuffer(bytes.fromhex(digits), np.uint8) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def schemes(html):
    """The custom properties of the light and of the dark scheme."""
    style = html[html.index("<style>") : html.index("</style>")]
    found = {"light": {}, "dark": {}}
    for block in re.finditer(r"(prefers-color-scheme: dark\) \{ )?:root \{([^}]*)\}", style):
        found["dark" if block.group(1) else "light"].update(re.findall(r"--([\w-]+): (#\w+)", block.group(2)))
    return found


class TestAccess:
    def test_language_title_and_viewport(self, parsed):
        assert parsed.all("html")[0]["lang"] == "en"
        assert "tiny <images> compared" in parsed.all("title")[0]["text"]
        assert any("width=device-width" in e.get("content", "") for e in parsed.all("meta"))
        assert len(parsed.all("main")) == 1

    def test_headings_are_in_order(self, parsed):
        levels = [int(e["tag"][1]) for e in parsed.all("h1", "h2", "h3", "h4")]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels))

    def test_tables_have_captions_and_headings_with_scope(self, parsed):
        assert len(parsed.all("caption")) == len(parsed.all("table")) > 8
        assert all(e["text"].strip() for e in parsed.all("caption"))
        assert all(e.get("scope") in ("col", "row") and e["text"].strip() for e in parsed.all("th"))

    def test_pictures_and_plots_have_names(self, parsed):
        for element in parsed.all("img"):
            assert element["alt"]
        named = [e for e in parsed.elements if e.get("role") in ("img", "region")]
        assert all(e["aria-label"].strip() for e in named)
        for element in parsed.all("svg"):
            inside_a_named_plot = element.get("focusable") == "false" and "figure" in element["inside"]
            assert element.get("aria-label") or element.get("aria-hidden") == "true" or inside_a_named_plot
        assert len([e for e in named if e["tag"] == "div" and e["role"] == "img"]) == 3 + 2 * len(NAMES)

    def test_boxes_that_scroll_can_be_reached_by_keyboard(self, parsed):
        boxes = [e for e in parsed.elements if "scroll" in e.get("class", "").split()]
        assert len(boxes) > 8
        assert all(e.get("tabindex") == "0" and e.get("role") in ("img", "region") for e in boxes)

    def test_names_in_the_page_are_unique_and_every_reference_has_one(self, parsed):
        ids = [e["id"] for e in parsed.elements if "id" in e]
        assert len(ids) == len(set(ids))
        targets = [e["href"][1:] for e in parsed.elements if e.get("href", "").startswith("#")]
        targets += [
            m for e in parsed.elements for m in re.findall(r"url\(#([^)]*)\)", str(e.get("clip-path")))
        ]
        targets += [e["aria-labelledby"] for e in parsed.elements if "aria-labelledby" in e]
        assert set(targets) <= set(ids)

    def test_nothing_is_fetched(self, page, parsed):
        for element in parsed.elements:
            for name in ("src", "href", "srcset", "action", "poster"):
                assert element.get(name, "#").startswith(("#", "data:image/png;base64,"))
        assert not re.search(r"https?://|@import|url\((?!#)", page.read_text(encoding="utf-8"))

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_texts_and_lines_stand_out(self, page, scheme):
        html = page.read_text(encoding="utf-8")
        found = schemes(html)
        colors = {**found["light"], **found[scheme]}
        assert set(found["dark"]) == set(found["light"])
        for ground in ("paper", "card"):
            for text in ("ink", "soft", "up", "down", "accent"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
            for i in range(N_SERIES):
                assert contrast(colors[f"series-{i + 1}"], colors[ground]) >= 3, (i, ground)

    def test_no_text_has_a_color_of_its_own(self, page):
        html = page.read_text(encoding="utf-8")
        style = html[html.index("<style>") : html.index("</style>")]
        outside = re.sub(r":root \{[^}]*\}", "", style)
        assert not re.search(r"#[0-9a-f]{3,6}\b", outside)
        for svg in re.findall(r"<svg focusable.*?</svg>", html, re.DOTALL):
            assert not re.search(r"(fill|stroke): #", svg)
            assert "<text" in svg

    def test_series_that_share_a_plot_differ_in_more_than_color(self, page):
        html = page.read_text(encoding="utf-8")
        start = html.index('aria-label="ROC curves')
        svg = html[start : html.index("</svg>", start)]
        used = set(re.findall(r"var\(--(series-\d)\)", svg))
        assert len(used) == len(NAMES) + 1
        markers = re.findall(r'<path id="([^"]*)" d="([^"]*)" style="[^"]*var\(--(series-\d)\)', svg)
        by_series = {series: shape for _, shape, series in markers}
        assert len(set(by_series.values())) == len(used)


# The pieces.


class TestGallery:
    def test_it_holds_the_extremes_of_every_method(self, results):
        gallery = results["gallery"]
        assert [m["name"] for m in gallery["methods"]] == list(NAMES)
        for m, method in enumerate(gallery["methods"]):
            scores = Scored(m).scores.numpy()
            for t, point in zip([p["index"] for p in gallery["points"]], method["points"], strict=True):
                order = np.argsort(-scores[t])
                assert [n["index"] for n in point["proponents"]] == order[:5].tolist()
                assert [n["index"] for n in point["opponents"]] == order[::-1][:5].tolist()
                for n in (*point["proponents"], *point["opponents"]):
                    assert n["score"] == scores[t, n["index"]]
                    assert n["label"] == n["index"] % N_CLASSES

    def test_every_shown_image_is_kept_once_and_drawn_by_reference(self, results, page, parsed):
        gallery = results["gallery"]
        shown = {n["index"] for m in gallery["methods"] for p in m["points"] for s in p.values() for n in s}
        shown |= {n["index"] for r in gallery["suspects"] for n in r["examples"]}
        assert set(gallery["pictures"]["train"]) == {str(i) for i in shown}
        assert set(gallery["pictures"]["test"]) == {str(p["index"]) for p in gallery["points"]}
        assert len(parsed.all("symbol")) == len(shown) + len(gallery["points"])
        assert page.read_text().count("data:image/png") == len(parsed.all("symbol"))

    def test_flipped_labels_are_marked(self, results, parsed):
        rankings = results["gallery"]["suspects"]
        flipped = [n["true_label"] != n["label"] for r in rankings for n in r["examples"]]
        assert sum(flipped) == sum(r["n_flipped"] for r in rankings) > 0
        marks = [e for e in parsed.all("span") if e.get("class") == "flip"]
        assert len(marks) == sum(flipped)

    def test_without_flips_it_ranks_by_the_methods_and_says_nothing_of_truth(self):
        task = tiny_task()
        gallery = Gallery(task, {"seed 0": task.build_model()}, range(N_TEST))
        gallery.add("one", Scored(0), Scored(0).scores.numpy())
        (ranking,) = gallery.to_dict()["suspects"]
        expected = Scored(0).mislabel_scores().argsort(descending=True)[:10]
        assert [n["index"] for n in ranking["examples"]] == expected.tolist()
        assert ranking["n_flipped"] is None
        assert {n["true_label"] for n in ranking["examples"]} == {None}

    @pytest.mark.slow
    def test_what_is_no_image_shows_labels_and_places(self, tmp_path):
        found = comparison(images=False, n_resamples=0).to_dict()
        found["counterfactual"] = []
        assert found["gallery"]["pictures"] == {"train": {}, "test": {}}
        html = write_comparison(found, tmp_path / "report.html").read_text(encoding="utf-8")
        assert '<use href="#train' not in html
        first = found["gallery"]["methods"][0]["points"][0]["proponents"][0]
        assert f'<b>{first["label"]}</b> <span class="soft">#{first["index"]}</span>' in html

    def test_points_begin_with_the_worst_mistake_and_go_through_the_classes(self):
        logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [1, 0, 0], [9, 0, 0], [0, 0, 3]])
        labels = torch.tensor([0, 1, 1, 1, 2])
        assert choose_points(logits, labels, 3) == [3, 0, 4]
        assert choose_points(logits[:2], labels[:2], 4) == [0, 1]

    @pytest.mark.parametrize("shape", [(1, 6, 4), (3, 5, 5), (7, 7)])
    def test_a_picture_is_the_example(self, shape):
        example = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        uri = picture(example, 0)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), dtype=float) / 255
        spread_out = (example - example.min()) / (example.max() - example.min())
        expected = spread_out.permute(1, 2, 0) if shape[0] == 3 else spread_out.reshape(shape[-2:])
        expected = 1 - expected if shape[0] == 1 else expected  # digits are dark on light
        assert pixels == pytest.approx(expected.numpy(), abs=1 / 255)

    def test_pictures_grow_by_whole_factors_and_vectors_have_none(self):
        image = Image.open(io.BytesIO(base64.b64decode(picture(torch.rand(1, 28, 28)).split(",")[1])))
        assert image.size == (84, 84)
        assert picture(torch.rand(12)) is None
        assert picture(torch.rand(2, 4, 4)) is None


class TestPlots:
    @pytest.mark.parametrize("seed", range(20))
    def test_labels_keep_their_order_and_their_distance(self, seed):
        values = np.random.default_rng(seed).random(9).tolist()
        places = spread(values, 0.1, 0.0, 1.0)
        order = np.argsort(values, kind="stable")
        steps = np.diff(np.array(places)[order])
        assert (steps > 0.1 - 1e-9).all()
        assert min(places) > -1e-9
        assert max(places) < 1 + 1e-9

    def test_labels_with_room_stay_where_they_are(self):
        assert spread([0.9, 0.1, 0.5], 0.1, 0.0, 1.0) == [0.9, 0.1, 0.5]
        assert spread([0.5] * 5, 1.0, 0.0, 1.0) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])

    def test_the_same_results_give_the_same_bits(self, results):
        rows = results["counterfactual"][:1]
        assert counterfactual_curves(rows) == counterfactual_curves(rows)

    def test_the_reference_is_drawn_beside_every_other_method(self, results):
        rows = [row for row in results["counterfactual"] if not row["result"]["opponents"]]
        for row, svg in zip(rows, counterfactual_curves(rows), strict=True):
            assert svg.count("stroke-dasharray") == (0 if row["name"] == "ClassRandom" else 2)


class TestReference:
    """The method that drops of the others are compared with is that of the question."""

    @pytest.mark.slow
    def test_is_named_and_drawn(self, results, tmp_path):
        found = json.loads(json.dumps(results))
        found["protocol"]["measures"]["counterfactual"] = {"reference": "Similarity"}
        text = write_comparison(found, tmp_path / "report.html").read_text(encoding="utf-8")
        assert "less Similarity at equal depletion" in text
        assert "the difference at equal depletion is to Similarity." in text
        assert "dashed: Similarity" in text
        assert "less ClassRandom" not in text
        assert "random examples of the class" not in text
        rows = [row for row in found["counterfactual"] if not row["result"]["opponents"]]
        (own,) = [i for i, row in enumerate(rows) if row["name"] == "Similarity"]
        assert counterfactual_curves(rows, "Similarity")[own].count("stroke-dasharray") == 0

    def test_is_random_examples_of_the_class_by_default(self, page):
        text = page.read_text(encoding="utf-8")
        assert "less ClassRandom at equal depletion" in text
        assert "ClassRandom, which removes random examples of the class" in text


class TestLeaks:
    def test_the_terminal_shows_how_often_the_copy_comes_first(self):
        row = next(row for row in full().leakage if row.n_planted == 4)
        odd = replace(row, result=replace(row.result, top1=0.125, rates={1: 0.875}))
        with console.capture() as captured:
            show_comparison(replace(full(), leakage=[odd]))
        assert "0.12 " in captured.get()
        assert "0.88" not in captured.get()

    def test_every_row_of_the_page_has_its_chance(self, results, page):
        shown = {e["data-path"] for e in Page(page.read_text("utf-8")).elements if "data-value" in e}
        plain = [i for i, row in enumerate(results["leakage"]) if row["normalize"] is None]
        assert {results["leakage"][i]["n_planted"] for i in plain} == {1, 4}
        assert {f"/leakage/{i}/result/chance_rank" for i in plain} <= shown


class TestSummary:
    def test_a_winner_is_named_only_where_the_interval_excludes_zero(self):
        found = full()
        first = found.rows[0]

        def against(low, high):
            row = found.rows[1]
            interval = row.against_first[1]
            other = replace(row, name="B", against_first=(0.0, replace(interval, low=low, high=high)))
            return " ".join(replace(found, rows=[first, other]).summary())

        assert "better than B" in against(0.01, 0.2)
        assert "worse than B" in against(-0.2, -0.01)
        for low, high in ((-0.1, 0.1), (0.0, 0.2), (-0.2, 0.0), (np.nan, np.nan)):
            assert "Between it and B these data do not decide" in against(low, high)


# In a browser.

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--allow-file-access-from-files", "--virtual-time-budget=5000",
)  # fmt: skip


def rendered(path, tmp_path):
    """The document after its scripts ran."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
class TestInABrowser:
    def test_figures_read_back_from_the_document(self, results, page, tmp_path):
        html = rendered(page, tmp_path)
        marked = [e for e in Page(html).elements if "data-value" in e]
        assert len(marked) > 300
        for element in marked:
            assert json.loads(element["data-value"]) == resolve(results, element["data-path"])
        assert not re.search(r"(src|href)=\"https?:", html)

    def test_a_heading_sorts_its_table_by_value_and_says_so(self, results, page, tmp_path):
        probe = """<script>
          const table = document.querySelector("table.sortable");
          const buttons = table.tHead.querySelectorAll("button");
          const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
          const note = (key, value) => { document.body.dataset[key] = JSON.stringify(value); };
          buttons[1].focus(); note("focused", document.activeElement === buttons[1]);
          buttons[1].click(); note("down", [names(), buttons[1].parentElement.getAttribute("aria-sort")]);
          buttons[1].click(); note("up", [names(), buttons[1].parentElement.getAttribute("aria-sort")]);
          buttons[0].click(); note("name", [names(), table.querySelectorAll("[aria-sort]").length]);
        </script></body>"""
        probed = tmp_path / "probed.html"
        probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
        (body,) = Page(rendered(probed, tmp_path)).all("body")
        by_lds = [row["name"] for row in sorted(results["rows"], key=lambda row: -row["lds"]["value"])]
        assert json.loads(body["data-focused"]) is True
        assert json.loads(body["data-down"]) == [by_lds, "descending"]
        assert json.loads(body["data-up"]) == [by_lds[::-1], "ascending"]
        names, n_sorted = json.loads(body["data-name"])
        assert sorted(names) == sorted(NAMES)
        assert [n for n in names if n[0] != "<"] == ["ClassRandom", "Similarity", "STRIDE"]
        assert n_sorted == 1

    def test_a_phone_scrolls_down_only(self, page, tmp_path):
        frame = tmp_path / "frame.html"
        frame.write_text(
            f"""<iframe src="{page.as_uri()}" width="390" height="800"></iframe><script>
            document.querySelector("iframe").onload = (event) => {{
              const root = event.target.contentDocument.documentElement;
              document.body.dataset.widths = JSON.stringify([root.clientWidth, root.scrollWidth]);
            }};</script>""",
            encoding="utf-8",
        )
        (body,) = re.findall(r'data-widths="\[(\d+),(\d+)\]"', rendered(frame, tmp_path))
        assert 370 <= int(body[0]) <= 390
        assert body[0] == body[1]


# End to end.


@pytest.mark.slow
def test_a_real_comparison_conforms_and_its_report_reads_back(tmp_path):
    found = compare(
        ["STRIDE", "ClassRandom", "Similarity"], load_task("digits", preset="smoke"), store=tmp_path,
        n_subsets=4, n_seeds=1, n_models=1, n_test=20, n_jobs=1, n_resamples=20,
        measures=("lds", "calibration", "mislabel"),
    ).to_dict()  # fmt: skip
    results = json.loads(json.dumps(found, allow_nan=False))
    jsonschema.validate(results, SCHEMA)
    html = write_comparison(results, tmp_path / "report.html").read_text(encoding="utf-8")
    marked = [e for e in Page(html).elements if "data-value" in e]
    assert all(json.loads(e["data-value"]) == resolve(results, e["data-path"]) for e in marked)
    assert results["gallery"]["pictures"]["train"]
    assert {row["name"] for row in results["mislabel"]} >= {"STRIDE", "loss"}


@pytest.mark.slow
def test_without_halves_there_is_no_panel_of_lds(tmp_path):
    found = compare(
        ["STRIDE", "KNNShapley", "Random"], load_task("digits", preset="smoke"), store=tmp_path,
        measures={"mislabel": {"n_held_out": 20, "detectors": ["loss"]}, "leakage": {"counts": (2,)}},
        options={"KNNShapley": {"k": 7}}, n_resamples=20,
    )  # fmt: skip
    assert found.rows == []
    assert found.protocol["options"] == {"STRIDE": {}, "KNNShapley": {"k": 7}, "Random": {}}
    assert found.skipped == {}
    assert "no options were chosen" in repr(found)
    assert [row.name for row in found.mislabel if not row.uses_influence] == ["loss"]
    with pytest.raises(ValueError, match=r"detectors\S* must be one of 'loss', .*; got 'lost'"):
        compare(
            ["Random"], load_task("digits", preset="smoke"), store=tmp_path,
            measures={"mislabel": {"detectors": ["lost"]}},
        )  # fmt: skip
    results = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    jsonschema.validate(results, SCHEMA)
    parsed = Page(write_comparison(results, tmp_path / "report.html").read_text(encoding="utf-8"))
    headings = {e.get("id") for e in parsed.all("h2", "h3")}
    assert {"mislabel", "leakage", "suspects"} <= headings
    assert not headings & {"fidelity", "cost", "calibration"}
    assert not list(tmp_path.glob("attributed-*")) or found.protocol["models"] == {}
