"""What notebooks show: which examples, in which order, with which words and colors."""

from __future__ import annotations

import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from captum.influence._core.tracincp import KMostInfluentialResults
from torch.utils.data import TensorDataset

from stride_captum.evaluation.comparison.runs.budget_row import BudgetRow
from stride_captum.evaluation.comparison.runs.counterfactual import CounterfactualRow
from stride_captum.evaluation.measures.cost import Cost
from stride_captum.evaluation.measures.counterfactual_drop import counterfactual
from stride_captum.evaluation.measures.linear_datamodeling import lds
from stride_captum.evaluation.measures.statistics import Interval
from stride_captum.evaluation.notebook.display import (
    OTHER,
    SAME,
    show_budgets,
    show_curves,
    show_drops,
    show_histograms,
    show_images,
    show_matrix,
    show_points,
    show_suspects,
    show_texts,
    show_top,
    show_values,
)
from stride_captum.subsets import random_subsets

matplotlib.use("agg")

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
TRAIN = TensorDataset(IMAGES, torch.tensor([0, 1, 0, 1, 0, 1]))
TEST = (IMAGES[:2], torch.tensor([0, 1]))
TOP = KMostInfluentialResults(torch.tensor([[2, 1], [5, 0]]), torch.tensor([[0.5, 0.25], [3.0, -0.0125]]))


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def shown(figure) -> list[np.ndarray]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


class TestImages:
    def test_each_has_its_title_and_color_row_by_row(self):
        figure = show_images(list(IMAGES[:3]), ["a", "b", "c"], colors=["black", "red", "black"], columns=2)
        assert titles(figure) == ["a", "b", "c"]
        assert [axes.title.get_color() for axes in figure.axes[:3]] == ["black", "red", "black"]
        assert len(figure.axes) == 4
        assert not figure.axes[3].images

    def test_small_grey_images_are_dark_on_white_and_colors_stay(self):
        grey = torch.zeros(1, 2, 2)
        grey[0, 0, 0] = 1.0
        assert shown(show_images([grey]))[0].tolist() == [[0, 1], [1, 1]]
        color = torch.zeros(3, 2, 2)
        color[1, 0, 1] = 1.0
        assert shown(show_images([color]))[0][0, 1, :3].tolist() == [0, 1, 0]

    def test_it_can_be_written_and_is_no_figure_of_pyplot(self):
        import matplotlib.pyplot as plt

        before, buffer = plt.get_fignums(), io.BytesIO()
        show_images(list(IMAGES)).savefig(buffer)
        assert plt.get_fignums() == before
        assert buffer.getvalue().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([],), "`images` must hold at least one image; got none."),
            ((IMAGES, ["a"]), "`titles` must have one entry for each of the 6 images; got 1."),
            (
                (torch.rand(2, 5),),
                r"`images` must be \(1, h, w\), .* or \(h, w\); got shape \(5,\).",
            ),
        ],
    )
    def test_what_it_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            show_images(*arguments)


class TestTop:
    def test_examples_stand_beside_their_test_image_with_label_and_score(self):
        figure = show_top(TOP, TEST, TRAIN)
        assert titles(figure) == [
            "test: 0",
            "0  0.5",
            "1  0.25",
            "test: 1",
            "1  3",
            "0  \N{MINUS SIGN}0.0125",
        ]
        colors = [axes.title.get_color() for axes in figure.axes if axes.get_title()]
        assert colors == ["black", SAME, OTHER, "black", SAME, OTHER]
        first_row = shown(figure)[:3]
        for picture, i in zip(first_row, (0, 2, 1), strict=True):
            np.testing.assert_array_equal(picture, shown(show_images([IMAGES[i]]))[0])

    def test_several_results_have_names_above_the_first_row(self):
        figure = show_top({"<for>": TOP, "against": TOP}, TEST, TRAIN, classes=["cat", "dog"])
        heads = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert heads == ["<for>", "against"]
        assert titles(figure)[:3] == ["test: cat", "cat  0.5", "dog  0.25"]
        assert len(titles(figure)) == 2 * (1 + 2 + 2)

    def test_results_of_another_batch_are_refused(self):
        message = r"`tops` must hold indices and scores of shape \(1, k\), .*; got \(2, 2\) and \(2, 2\)."
        with pytest.raises(ValueError, match=message):
            show_top(TOP, (IMAGES[:1], torch.tensor([0])), TRAIN)


class TestSuspects:
    def test_the_most_suspect_come_first_with_the_truth_where_it_differs(self):
        scores = torch.tensor([0.0, 5.0, 1.0, 5.0, 0.0, 0.0])
        figure = show_suspects(scores, TRAIN, n=3, true_labels=[0, 0, 0, 1, 0, 1])
        assert titles(figure) == ["1, truly 0", "1", "0"]
        assert figure.axes[0].title.get_color() == OTHER

    def test_it_wants_a_score_for_each_example(self):
        with pytest.raises(ValueError, match=r"`scores` must have shape \(6,\); got \(2,\)."):
            show_suspects([1.0, 2.0], TRAIN)


class TestTexts:
    def test_html_and_plain_text_say_the_same_and_texts_are_escaped(self):
        found = show_texts(
            TOP,
            ["is <b> bold", "two"],
            [f"text {i}" for i in range(6)],
            test_labels=["x", "y"],
            train_labels=["x", "y"] * 3,
        )
        html = found._repr_html_()
        assert "is &lt;b&gt; bold" in html
        assert "<b>" not in html
        assert html.count(SAME) == html.count(OTHER) == 2
        assert repr(found).splitlines() == [
            "test x: is <b> bold",
            "  0.5 x: text 2",
            "  0.25 y: text 1",
            "test y: two",
            "  3 y: text 5",
            "  \N{MINUS SIGN}0.0125 x: text 0",
        ]
        order = [html.index(f"text {i}") for i in (2, 1, 5, 0)]
        assert order == sorted(order)


class TestPlots:
    def test_values_are_points_ticks_or_intervals_in_their_order(self):
        figure = show_values(
            {"one": 1.0, "spread": [1.0, 3.0], "sure": (4.0, Interval(3.0, 5.0)), "none": (np.nan, None)},
            label="LDS",
            lines={"ceiling": 6.0},
        )
        (axes,) = figure.axes
        assert [text.get_text() for text in axes.get_yticklabels()] == ["none", "sure", "spread", "one"]
        assert [text.get_text() for text in axes.texts] == ["4", "2", "1"]
        assert axes.get_xlabel() == "LDS"
        assert axes.get_legend().get_texts()[0].get_text() == "ceiling"
        assert [3.0, 5.0] in [list(line.get_xdata()) for line in axes.lines]

    def test_curves_and_points_hold_what_they_are_given(self):
        (axes,) = show_curves({"a": (torch.arange(3), torch.ones(3))}, x="K", y="LDS", log=("x",)).axes
        assert axes.get_xscale() == "log"
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.ones(3))
        left, right = show_points({"a": ([1], [2]), "b": ([3], [4])}, x="x", y="y").axes
        assert (left.get_title(), right.get_title()) == ("a", "b")
        assert right.lines[0].get_xydata().tolist() == [[3, 4]]

    def test_histograms_are_shares_over_one_axis(self):
        figure = show_histograms({"few": [0.0, 1.0], "many": torch.linspace(0, 2, 50)}, label="score", bins=4)
        for axes in figure.axes:
            assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
            assert axes.get_xlim() == figure.axes[0].get_xlim()
        assert figure.axes[0].get_title("left") == "few (2)"

    def test_a_matrix_has_a_bar_where_its_entries_are_named(self):
        assert len(show_matrix(np.eye(3), x="example", y="subset").axes) == 1
        assert len(show_matrix(np.eye(3), x="example", y="subset", label="weight").axes) == 2

    @pytest.mark.parametrize("opponents", [False, True])
    def test_drops_start_at_zero_and_opponents_have_no_share_of_the_class(self, opponents):
        result = counterfactual(
            [[0.9, 0.8]], [[[0.7, 0.6]]], [[0.5, 0.5]], counts=(3,), opponents=opponents, n_resamples=10
        )
        row = CounterfactualRow("M", result, None, None, None, None)  # type: ignore[arg-type]
        figure = show_drops([row])
        assert len(figure.axes) == (1 if opponents else 2)
        assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0], [3, pytest.approx(0.2)]]
        if not opponents:
            assert figure.axes[1].lines[0].get_xydata().tolist() == [[0, 0], [50, pytest.approx(0.2)]]

    def test_budgets_are_lines_with_bands_over_evenly_spaced_steps(self):
        def row(name, source, trainings, value):
            scores = np.random.default_rng(0).normal(size=(4, 20))
            halves = random_subsets(20, 10, 10)
            found = replace(lds(scores, halves, halves @ scores.T, n_resamples=20), value=value)
            cost = Cost(fit_seconds=1.0, query_seconds=1.0, n_queries=4, forward_seconds=1.0)
            return BudgetRow(name, source, trainings, 2, {}, None, None, found, None, None, None, cost)

        steps = [("last checkpoint", 0.0), ("cross-fitted", 1.0), ("cross-fitted", 5.0)]
        rows = [row("a", *step, 0.1 * i) for i, step in enumerate(steps)]
        rows += [row("a", "refined", 5.0, 0.4), row("b", "cross-fitted", 1.0, 0.3)]
        (axes,) = show_budgets(rows).axes
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert drawn["a"] == [[0, 0], [1, pytest.approx(0.1)], [2, pytest.approx(0.2)]]
        assert drawn["a,\nrefined"] == [[2, 0.4]]
        assert drawn["b"] == [[1, 0.3]]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["last\ncheckpoint", "1", "5"]
        assert len(axes.collections) == 2  # bands of the two methods, not of refined scores
