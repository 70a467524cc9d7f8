"""What the paper printed is what stands here, and its tables show the rows that measure it."""

from itertools import pairwise

import pytest
from planted import MLP, trained

from stride_captum import ClosedForm, Partition, RandomSubsets, Trained
from stride_captum.evaluation.comparison.plan import MEASURES
from stride_captum.evaluation.comparison.shared.methods import METHODS, find_method, fitting
from stride_captum.evaluation.tasks.networks import CIFAR10_TRAINING, MNIST_TRAINING, cifar10_cnn, mnist_mlp
from stride_captum.evaluation.tasks.paper_tables import PAPER_SIZE, TABLES, find_table

#: Copied from the text of the paper, ± as +-.
PRINTED = {
    "table1-mnist": """
        TracIn  0.103 +- 0.18  0.107 +- 0.13  -      22.35
        EKFAC   0.105 +- 0.19  0.106 +- 0.13  17.18  28.10
        STRIDE  0.116 +- 0.06  0.057 +- 0.11  77.18  2.21""",
    "table1-cifar10": """
        TracIn  0.276 +- 0.25  0.655 +- 0.21  -       28.76
        EKFAC   0.288 +- 0.21  0.738 +- 0.17  23.28   27.10
        STRIDE  0.319 +- 0.05  0.663 +- 0.08  110.38  1.72""",
    "table6": """
        No LDS loss  0.149 +- 0.09
        layer1  -0.012 +- 0.12""",
    "table7": """
        No LDS loss  0.248 +- 0.10
        conv  0.223 +- 0.06""",
    "table8": """
        ClassRandom  0.001 +- 0.00  0.013 +- 0.01  0.352 +- 0.06  0.538 +- 0.08
        EKFAC        0.002 +- 0.01  0.016 +- 0.02  0.438 +- 0.12  0.737 +- 0.11
        TracIn       0.003 +- 0.01  0.012 +- 0.02  0.424 +- 0.13  0.728 +- 0.13
        STRIDE       0.001 +- 0.00  0.015 +- 0.03  0.471 +- 0.12  0.811 +- 0.10""",
    "table9": """
        ClassRandom  0.036 +- 0.02  0.088 +- 0.05  0.305 +- 0.06  0.532 +- 0.07
        EKFAC        0.067 +- 0.07  0.171 +- 0.10  0.591 +- 0.14  0.846 +- 0.08
        TracIn       0.066 +- 0.06  0.151 +- 0.08  0.540 +- 0.11  0.776 +- 0.12
        STRIDE       0.106 +- 0.07  0.193 +- 0.09  0.659 +- 0.11  0.915 +- 0.06""",
    "table10": """
        Random  0.100 +- 0.00  0.100 +- 0.00
        TracIn  0.785 +- 0.02  0.785 +- 0.02
        EKFAC   0.853 +- 0.02  0.853 +- 0.02
        STRIDE  0.921 +- 0.01  0.921 +- 0.01""",
    "table11": """
        Random  0.099 +- 0.00  0.099 +- 0.00
        TracIn  0.362 +- 0.02  0.362 +- 0.02
        EKFAC   0.513 +- 0.02  0.513 +- 0.02
        STRIDE  0.634 +- 0.02  0.634 +- 0.02""",
    "table12": """
        Random  29964 +- 17320  0.00
        TracIn  0.00 +- 0.00    1.00
        EKFAC   0.00 +- 0.00    1.00
        STRIDE  0.00 +- 0.00    1.00""",
    "table13": """
        Random  24975 +- 14433  0.00
        TracIn  1.10 +- 1.37    0.60
        EKFAC   0.50 +- 0.71    0.80
        STRIDE  0.20 +- 0.42    0.90""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_figures_are_those_of_the_paper(name):
    rows = [[c.strip() for c in line.split("  ") if c.strip()] for line in PRINTED[name].strip().split("\n")]
    assert {row: list(figures) for row, figures in find_table(name).printed.items()} == {
        row[0]: row[1:] for row in rows
    }
    table = find_table(name)
    assert all(len(figures) == len(table.columns) for figures in table.printed.values())
    assert table.name == name
    assert table.measure in MEASURES


def test_every_table_of_results_is_pinned():
    assert PRINTED.keys() == TABLES.keys()
    with pytest.raises(ValueError, match=r"`table` must be one of .*; got 'table5'"):
        find_table("table5")


def test_table_2_has_the_widths_of_the_networks():
    mlp, cnn = mnist_mlp(), cifar10_cnn()
    assert [tuple(p.shape) for p in mlp.parameters() if p.ndim > 1] == [(512, 784), (256, 512), (10, 256)]
    shapes = [tuple(p.shape) for p in cnn.parameters() if p.ndim > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (512, 1024), (10, 512)]
    assert cnn.dropout.p == 0.5


def test_table_3_has_the_settings_of_the_trainings():
    mnist, cifar = vars(MNIST_TRAINING), vars(CIFAR10_TRAINING)
    assert mnist == {
        "optimizer": "adam", "learning_rate": 0.001, "epochs": 20, "batch_size": 64, "weight_decay": 0.0,
        "momentum": 0.0,
    }  # fmt: skip
    assert cifar == {
        "optimizer": "sgd", "learning_rate": 0.01, "epochs": 40, "batch_size": 64, "weight_decay": 1e-4,
        "momentum": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "rank", "learning_rate", "iterations", "linearity", "stability"),
    [("mnist", 32, 0.005, 250, 10.0, 1.0), ("cifar10", 64, 0.001, 200, 1.0, 1.0)],
)
def test_table_4_has_the_options_of_the_operators(
    data, rank, learning_rate, iterations, linearity, stability
):
    preset = Trained.paper(data)
    assert (preset.rank, preset.learning_rate, preset.iterations) == (rank, learning_rate, iterations)
    assert (preset.linearity_weight, preset.stability_weight) == (linearity, stability)
    assert preset.fidelity_weight == 1.0
    assert preset.subsets == Partition(50, size=100)


@pytest.mark.parametrize("name", [n for n in TABLES if n not in ("table6", "table7")])
def test_three_rows_of_ours_stand_under_names_of_their_own(name):
    table = find_table(name)
    ours = [method for method in table.methods if method.startswith("STRIDE")]
    assert ours == ["STRIDE", f"STRIDE paper ({table.task})", "STRIDE trained + Lasso"]
    model, train, _ = trained(MLP)
    operators = [find_method(method)(model, train, {}).operators for method in ours]
    assert operators == [ClosedForm(), Trained.paper(table.task, **fitting(len(train))), Trained()]
    assert operators[2].linearity_weight == 1.0
    assert "Its STRIDE is the row of the paper's preset" in table.differs
    assert set(table.methods) <= set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("table6", ["relu1"]), ("table7", ["relu2"])])
def test_ablations_differ_from_the_whole_in_one_thing(name, layer):
    model, train, test = trained(MLP)
    whole = Trained()
    rows = {m: find_method(m)(model, train, {}) for m in find_table(name).methods}
    changes = {
        "STRIDE trained, no LDS loss": {"linearity_weight": 0.0, "stability_weight": 0.0},
        "STRIDE trained, no linearity": {"linearity_weight": 0.0},
        "STRIDE trained, no stability": {"stability_weight": 0.0},
    }
    for row, change in changes.items():
        assert rows[row].operators == Trained(**change)
        assert rows[row].layers is None
    (one,) = [method for row, method in rows.items() if method.layers is not None]
    assert (one.operators, list(one.layers)) == (whole, layer)
    assert rows["STRIDE trained + Lasso"].operators == whole
    few = {"subsets": RandomSubsets(20), "iterations": 10}
    scores = [
        find_method(m)(model, train, few).influence(test.tensors)
        for m in (*changes, "STRIDE trained + Lasso")
    ]
    for i, found in enumerate(scores):
        assert all(not found.equal(other) for other in scores[i + 1 :])


@pytest.mark.parametrize("name", ["table8", "table9"])
def test_drops_are_measured_at_every_printed_count_and_at_its_share_of_smaller_sets(name):
    table = find_table(name)
    assert table.columns == ("k=50", "k=100", "k=500", "k=1000")
    size = PAPER_SIZE[table.task]
    assert table.settings_for(size) == {"counts": (50, 100, 500, 1000)}
    half = table.settings_for(size // 2)["counts"]
    assert half == (25, 50, 250, 500)
    for n_train in (500, 1000, 2000, 5000):
        counts = table.settings_for(n_train)["counts"]
        assert len(counts) == 4
        assert counts[0] >= 1
        assert all(a < b for a, b in pairwise(counts))
        assert counts[3] == pytest.approx(1000 * n_train / size, abs=0.51)


def test_other_measures_have_the_settings_of_the_paper():
    assert find_table("table10").settings_for(300) == {"rate": 0.1}
    assert find_table("table12").settings_for(300) == {"counts": (10,)}
    assert find_table("table1-mnist").settings_for(300) == {}
