"""The command line end to end on small runs: what it writes, prints and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

from stride_captum.evaluation import load_task, train_attributed
from stride_captum.evaluation.cli import comparison_run, reproduce
from stride_captum.evaluation.cli.app import app
from stride_captum.evaluation.comparison.plan import MEASURES
from stride_captum.evaluation.comparison.shared.measure import Measure
from stride_captum.evaluation.report import terminal
from stride_captum.evaluation.retraining import estimate as retraining_estimate
from stride_captum.system import atomic as whole_files

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


OWN_TRAINING = """
import torch
from torch import nn

def train(indices, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


class TestExplainCrossFitted:
    @pytest.mark.slow
    def test_its_models_are_counted_and_then_trained(self, tmp_path):
        how = [
            "explain",
            "--preset",
            "smoke",
            "--index",
            3,
            "--retrainings",
            1,
            "--training",
            '{"epochs": 2}',
        ]
        how += ["--store", tmp_path / "store", "--out", tmp_path / "out"]
        planned = invoke(*how, "--dry-run")
        assert planned.exit_code == 0, planned.output
        assert "2 trainings of digits-300: 0 are in the store, 2 are to do" in planned.output
        assert "costs 1 training on the whole" in planned.output
        assert not (tmp_path / "store").exists()
        done = invoke(*how)
        assert done.exit_code == 0, done.output
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert results["models"]["n_models"] == 2
        assert "not one file of weights" in results["note"]
        assert "not one file of weights" in " ".join(done.output.split())
        assert len(list((tmp_path / "store/cross-fitted").iterdir())) == 2

    @pytest.mark.slow
    def test_by_a_function_of_the_users(self, tmp_path, monkeypatch):
        (tmp_path / "own_training_of_a_test.py").write_text(OWN_TRAINING)
        monkeypatch.syspath_prepend(tmp_path)
        how = ["explain", "--preset", "smoke", "--index", 3, "--model", "own_training_of_a_test:network"]
        how += ["--train-function", "own_training_of_a_test:train", "--parts", 3, "--store", tmp_path / "s"]
        refused = invoke(*how, "--out", tmp_path / "out")
        assert refused.exit_code == 2
        assert "`train_function` must be left out without `retrainings`" in refused.output
        how += ["--retrainings", 1]
        planned = invoke(*how, "--dry-run", "--json", "--out", tmp_path / "out")
        said = json.loads(planned.stdout)["trainings"]
        assert said[0].startswith("3 trainings by your function on 100 of 300 examples each: 0 are")
        done = invoke(*how, "--out", tmp_path / "out")
        assert done.exit_code == 0, done.output
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert (results["models"]["n_models"], results["models"]["parts"]) == (3, 3)


class TestRetrainings:
    @pytest.mark.slow
    def test_budgets_are_numbers_with_commas(self, tmp_path):
        how = ["compare", "--preset", "smoke", "--store", tmp_path, "--out", tmp_path / "out"]
        refused = invoke(*how, "--retrainings", "one,2")
        assert refused.exit_code == 2
        assert "`retrainings` must be numbers with commas between them; got 'one,2'" in refused.output
        few = ["--method", "STRIDE", "--measure", "lds", "--subsets", 4, "--seeds", 1, "--models", 2]
        planned = invoke(*how, *few, "--retrainings", "0,2", "--parts", 3, "--dry-run")
        assert planned.exit_code == 0, planned.output
        assert "cross-fitted parts, 3 of each: 12 trainings of digits-300" in planned.output
        assert "checkpoints of attributed models: 2 trainings" in planned.output

    @pytest.mark.slow
    def test_all_measures_are_those_without_a_budget(self, tmp_path):
        how = ["compare", "--preset", "smoke", "--store", tmp_path, "--out", tmp_path / "out", "--dry-run"]
        planned = invoke(*how, "--measure", "all", "--method", "STRIDE")
        assert not any(line.startswith("cross-fitted") for line in planned.output.splitlines())


class TestExplain:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, store, tmp_path_factory):
        out = tmp_path_factory.mktemp("explain")
        result = invoke(
            "explain",
            "--preset",
            "smoke",
            "--index",
            3,
            "--index",
            17,
            "--k",
            4,
            "--store",
            store,
            "--out",
            out,
        )
        assert result.exit_code == 0, result.output
        return result, json.loads((out / "results.json").read_text()), (out / "report.html").read_text()

    @pytest.mark.slow
    def test_results_hold_what_was_asked_for(self, run):
        _, results, _ = run
        assert [point["index"] for point in results["points"]] == [3, 17]
        for point in results["points"]:
            best = [n["score"] for n in point["proponents"]]
            worst = [n["score"] for n in point["opponents"]]
            assert len(best) == len(worst) == 4
            assert best == sorted(best, reverse=True)
            assert worst == sorted(worst)
        assert results["seconds"].keys() == {"forward", "fit", "query"}
        assert results["settings"]["operators"]["name"] == "closed-form"
        assert results["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]

    def test_the_report_shows_every_figure_and_needs_no_network(self, run):
        _, results, html = run
        for point in results["points"]:
            assert f"Test point {point['index']}, labeled {point['label']}" in html
            for neighbor in point["proponents"] + point["opponents"]:
                assert f"#{neighbor['index']}<" in html
                assert f"{neighbor['score']:+.3g}" in html
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
        assert len(re.findall(r"<img [^>]*alt=\"[^\"]+\"", html)) == html.count("<img ")

    def test_the_terminal_shows_proponents_and_timing(self, run):
        result, results, _ = run
        assert f"#{results['points'][0]['proponents'][0]['index']}" in result.output
        assert "Forward pass" in result.output

    @pytest.mark.slow
    def test_a_checkpoint_replaces_the_training(self, store, tmp_path):
        task = load_task("digits", preset="smoke")
        model = train_attributed(task, 5)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        arguments = ["--index", 0, "--preset", "smoke", "--store", tmp_path / "none", "--quiet"]
        first = invoke("explain", *arguments, "--checkpoint", tmp_path / "model.pt", "--out", tmp_path / "a")
        second = invoke("explain", *arguments, "--seed", 5, "--out", tmp_path / "b")
        assert first.exit_code == second.exit_code == 0
        assert first.output == ""
        points = [json.loads((tmp_path / d / "results.json").read_text())["points"] for d in "ab"]
        assert points[0] == points[1]

    def test_own_options(self, store, tmp_path):
        options = '{"residuals": "training", "damping": 0.1}'
        result = invoke(
            "explain",
            "--preset",
            "smoke",
            "--index",
            0,
            "--operators",
            options,
            "--store",
            store,
            "--out",
            tmp_path,
        )
        assert result.exit_code == 0
        assert (
            json.loads((tmp_path / "results.json").read_text())["settings"]["operators"]["residuals"]
            == "training"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "digit"], r"`task` must be one of 'digits', .*Nearest: 'digits'"),
        (["--preset", "large"], r"`preset` must be one of"),
        (["--task", "mnist"], r"Name their folder with --data-root"),
        (["--preset", "smoke", "--index", "4000"], r"has points 0 to 399; got 4000"),
        (["--operators", "{damping}"], r"`operators` must be a JSON object"),
        (["--operators", "[1]"], r"`operators` must be one of 'closed-form', 'trained'"),
        (["--operators", '{"dampin": 1}'], r"Nearest: 'damping'"),
        (["--features", "[1]"], r"`features` must be a JSON object"),
        (["--model", "nothing.here:make"], r"`model` must name a module that can be imported"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(arguments, sentence, store, tmp_path):
    result = invoke("explain", *arguments, "--store", store, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert re.search(sentence, result.stderr)
    assert "Traceback" not in result.output


OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))


def table(train):
    generator = torch.Generator().manual_seed(int(train))
    y = torch.arange(60) % 2
    return [{"x": x, "kind": k} for x, k in zip(torch.randn(60, 6, generator=generator) + y[:, None], y)]
"""
OF_OWN = [
    "--data", "own_module_of_a_folder:table", "--model", "own_module_of_a_folder:net", "--label-key", "kind",
    "--training", '{"epochs": 3}', "--preset", "smoke", "--quiet",
]  # fmt: skip
FEW = [
    "--method", "Random", "--measure", "lds", "--subsets", "4", "--seeds", "1", "--models", "1",
    "--test-points", "20", "--jobs", "1",
]  # fmt: skip


class TestOwn:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "own_module_of_a_folder.py").write_text(OWN)
        return tmp_path

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "command", [["explain", "--index", "3"], ["compare", *FEW]], ids=["explain", "compare"]
    )
    def test_a_binary_network_and_examples_that_are_dicts(self, folder, monkeypatch, command):
        monkeypatch.syspath_prepend(folder)
        result = invoke(*command, *OF_OWN, "--store", folder / "store", "--out", folder)
        assert result.exit_code == 0, result.output
        assert "Data from own_module" in json.loads((folder / "results.json").read_text())["note"]

    @pytest.mark.slow
    def test_modules_of_the_current_folder_come_after_those_that_are_installed(self, folder):
        """A file of the user's with the name of a package that the command line imports is not run."""
        for name in ("typer", "rich", "jinja2"):
            (folder / f"{name}.py").write_text("raise SystemExit(7)")
        out = os.fsencode(folder) + b"/f\xf6lder"
        command = [sys.executable, "-m", "stride_captum", "compare", *OF_OWN, *FEW, "--out", out]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stderr
        written = [folder / os.fsdecode(out) / name for name in ("asked.json", "results.json", "report.html")]
        assert all(path.stat().st_size for path in written)

    def test_an_index_counts_in_the_data_set_as_it_is(self, folder, monkeypatch):
        monkeypatch.syspath_prepend(folder)
        by_class = OWN.replace("torch.arange(60) % 2", "torch.arange(60) // 30")
        (folder / "own_module_by_class.py").write_text(by_class)
        arguments = [text.replace("_of_a_folder", "_by_class") for text in OF_OWN]
        places = [part for i in (2, 9, 17, 25, 33, 41, 50, 59) for part in ("--index", i)]
        found = invoke("explain", *places, *arguments, "--store", folder / "store", "--out", folder)
        assert found.exit_code == 0, found.output
        points = json.loads((folder / "results.json").read_text())["points"]
        assert [point["label"] for point in points] == [0, 0, 0, 0, 1, 1, 1, 1]


class TestWholeFiles:
    """A run that is killed as it writes leaves the files of the run before."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("command", "written"),
        [
            (["explain", "--preset", "smoke", "--index", "0"], "results.json"),
            (["compare", "--preset", "smoke", *FEW], "asked.json"),
            (["compare", "--preset", "smoke", *FEW], "results.json"),
            (["compare", "--preset", "smoke", *FEW], "report.html"),
            (["bench", "recovery", "--test-points", "2", "--n-subsets", "8", "--n-train", "60",
              "--subset-size", "20", "--reference", "1"], "recovery.json"),
        ],
    )  # fmt: skip
    def test_the_old_content_stays(self, store, tmp_path, monkeypatch, command, written):
        replace = os.replace

        def killed(source, target):
            if Path(target).name == written:
                raise KeyboardInterrupt
            replace(source, target)

        kept = [] if command[0] == "bench" else ["--store", store]
        arguments = [*command, *kept, "--out", tmp_path, "--quiet"]
        (tmp_path / written).write_text("old")
        monkeypatch.setattr(whole_files.os, "replace", killed)
        assert invoke(*arguments).exit_code == 130
        assert (tmp_path / written).read_text() == "old"
        assert not list(tmp_path.glob("*.part"))
        monkeypatch.setattr(whole_files.os, "replace", replace)
        assert invoke(*arguments).exit_code == 0
        assert (tmp_path / written).read_text() != "old"

    def test_scalability(self, tmp_path, monkeypatch):
        from stride_captum.evaluation.benchmarks.scalability import report as scalability_report

        found = SimpleNamespace(to_dict=dict, results=[])
        monkeypatch.setattr(scalability_report, "scalability_plot", lambda results: "<svg/>")
        for name in ("results.json", "scalability.svg"):
            (tmp_path / name).write_text("old")
        monkeypatch.setattr(whole_files.os, "fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scalability_report.write_scalability(found, tmp_path)
        assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


@pytest.mark.parametrize("command", [("compare",), ("reproduce", "table1-mnist")])
def test_a_dry_run_of_a_run_that_goes_on_trains_nothing(tmp_path, monkeypatch, command):
    monkeypatch.setattr(reproduce, "load_task", lambda *_, **__: load_task("synthetic", preset="smoke"))
    folder = tmp_path / "table1-mnist-small" if command[0] == "reproduce" else tmp_path
    folder.mkdir(exist_ok=True)
    asked = {"preset": "smoke"} if command[0] == "compare" else {"table": "table1-mnist"}
    asked |= {"method": ["Random"], "subsets": 6, "seeds": 1, "store": str(tmp_path / "store")}
    (folder / "asked.json").write_text(json.dumps(asked))
    monkeypatch.setattr(comparison_run, "answer", lambda question: pytest.fail("trained"))
    result = invoke(*command, "--resume", "--dry-run", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["estimates"]


@pytest.mark.slow
def test_options_from_tuned_points_that_are_reported_are_told(tmp_path):
    protocol = {"options": {"STRIDE": {}}, "n_test_tuning": 150}
    results = {"format": 1, "task": "digits-1397", "protocol": protocol}
    (tmp_path / "other.json").write_text(json.dumps(results))
    asked = (
        "compare", "--preset", "smoke", "--method", "STRIDE", "--options-from", tmp_path / "other.json",
        "--measure", "lds", "--store", tmp_path, "--out", tmp_path / "out", "--dry-run",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="chosen on the first 150 test points, and test points from 60 on"):
        assert invoke(*asked).exit_code == 0
    results["task"] = "synthetic-300"  # other test points
    (tmp_path / "other.json").write_text(json.dumps(results))
    assert invoke(*asked).exit_code == 0


def test_what_a_run_was_asked_may_be_damaged(tmp_path):
    (tmp_path / "asked.json").write_text('{"task": ')
    result = invoke("compare", "--resume", "--out", tmp_path)
    assert result.exit_code == 2
    assert re.search(
        "`--resume` must find what the run was asked; .*asked.json, which is damaged", result.stderr
    )


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "--preset", "smoke"],
        ["bench", "retraining", "--case", "digits", "--stack", "2"],
        ["bench", "scalability", "--size", "1x8", "--method", "STRIDE", "--no-exponents"],
    ],
    ids=lambda command: command[1],
)
def test_a_device_that_is_not_there_is_one_sentence(command, tmp_path):
    result = invoke(*command, "--device", "cuda:99", "--out", tmp_path / "out")
    assert result.exit_code == 2
    sentence = r"Error: `device` must be a device that torch can use here; got 'cuda:99'. Here: cpu.*\n"
    assert re.fullmatch(sentence, result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_model_that_has_learned_nothing_is_named(tmp_path):
    arguments = ["--preset", "smoke", "--index", 0, "--training", '{"epochs": 1, "learning_rate": 0}']
    result = invoke("explain", *arguments, "--store", tmp_path, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "The model has learned nothing" in result.stdout
    assert "The model has learned nothing" in (tmp_path / "report.html").read_text()


def test_the_version_is_told():
    assert re.fullmatch(r"stride-captum \d+\.\d+\.\d+\n", invoke("--version").stdout)


def test_a_file_that_holds_no_weights_is_one_sentence(tmp_path, store):
    (tmp_path / "weights.pt").write_text("none")
    result = invoke("explain", "--checkpoint", tmp_path / "weights.pt", "--store", store, "--out", tmp_path)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "`checkpoint` must be a file of weights" in result.output


def test_a_dry_run_knows_the_methods(store, tmp_path):
    result = invoke("compare", "--method", "ekfac", "--dry-run", "--store", store, "--out", tmp_path)
    assert result.exit_code == 2
    assert "Nearest" in result.stderr


def test_a_table_that_is_too_wide_comes_in_pieces_with_the_first_column(monkeypatch):
    rows = [("STRIDE, a long name", *(f"{i}.{i}{i}{i}" for i in range(8)))]
    monkeypatch.setattr(terminal.console, "width", 50)
    with terminal.console.capture() as captured:
        terminal.console.print(terminal.table_of("title", ("method", *"abcdefgh"), rows))
    text = captured.get()
    assert text.count("STRIDE, a long name") == 3
    assert all(f"{i}.{i}{i}{i}" in text for i in range(8))
    assert "…" not in text


@pytest.mark.slow
class TestCompare:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, store, tmp_path_factory):
        out = tmp_path_factory.mktemp("compare")
        methods = ("STRIDE", "STRIDE (tuned)", "ClassRandom", "Random")
        result = invoke(
            "compare", *(part for m in methods for part in ("--method", m)), "--preset", "smoke",
            "--subsets", 12, "--models", 2, "--test-points", 40, "--jobs", 1, "--store", store, "--out", out,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return result, json.loads((out / "results.json").read_text()), (out / "report.html").read_text()

    def test_every_method_has_every_figure(self, run):
        _, results, _ = run
        assert [row["name"] for row in results["rows"]] == [
            "STRIDE",
            "STRIDE (tuned)",
            "ClassRandom",
            "Random",
        ]
        for row in results["rows"]:
            assert len(row["lds"]["per_model"]) == 2
            assert row["lds"]["value"] == pytest.approx(sum(row["lds"]["per_model"]) / 2)
            assert row["cost"]["fit_seconds"] > 0
        assert results["protocol"]["n_test_reported"] == 20
        assert results["rows"][1]["options"].keys() == {"temperature", "damping"}

    def test_stride_beats_its_random_control(self, run):
        _, results, _ = run
        gap = results["rows"][3]["first_row_less_this"]
        assert gap["value"] > 0.1
        assert gap["interval"][0] > 0

    def test_the_report_has_the_table_and_the_plot(self, run):
        _, results, html = run
        assert "<svg" in html
        for row in results["rows"]:
            assert row["name"] in html
            assert f"{row['lds']['value']:.3f}" in html

    def test_a_run_goes_on_as_it_was_asked(self, store, tmp_path):
        few = ("--preset", "smoke", "--subsets", 12, "--models", 1, "--test-points", 40, "--jobs", 1)
        methods = ("--method", "STRIDE (tuned)", "--method", "Random")
        asked = (*methods, *few, "--store", store, "--out", tmp_path)
        whole = invoke("compare", *asked, "--measure", "lds", "--quiet")
        assert whole.exit_code == 0, whole.output
        first = json.loads((tmp_path / "results.json").read_text())
        for _ in range(2):  # also after a run that was resumed itself
            (tmp_path / "results.json").unlink()
            again = invoke("compare", "--resume", "--out", tmp_path, "--quiet")
            assert again.exit_code == 0, again.output
        second = json.loads((tmp_path / "results.json").read_text())
        for part in ("rows", "protocol", "summary"):  # cost too: no method was fitted again
            assert second[part] == first[part]

    def test_options_come_from_another_comparison(self, run, store, tmp_path):
        _, results, _ = run
        results["protocol"]["options"]["STRIDE (tuned)"]["damping"] = 0.7
        (tmp_path / "other.json").write_text(json.dumps(results))
        result = invoke(
            "compare", "--method", "STRIDE (tuned)", "--preset", "smoke", "--measure", "leakage",
            "--options-from", tmp_path / "other.json", "--store", store, "--out", tmp_path, "--settings",
            '{"leakage": {"counts": [2]}}',
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "results.json").read_text())
        assert found["protocol"]["options"]["STRIDE (tuned)"]["damping"] == 0.7
        assert found["rows"] == []
        assert "Leaked test examples" in result.output

    @pytest.mark.parametrize(("settings", "n_models"), [("", 2), (', "n_models": 1', 1)])
    def test_models_also_counts_those_that_a_measure_trains(self, store, tmp_path, settings, n_models):
        result = invoke(
            "compare", "--method", "Similarity", "--preset", "smoke", "--measure", "leakage", "--models", 2,
            "--store", store, "--out", tmp_path, "--settings", f'{{"leakage": {{"counts": [2]{settings}}}}}',
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "results.json").read_text())
        assert len(found["leakage"][0]["result"]["ranks"]) == n_models

    def test_nothing_can_be_resumed_where_nothing_was_started(self, tmp_path):
        result = invoke("compare", "--resume", "--out", tmp_path)
        assert result.exit_code == 2
        assert "No run was started in" in result.stderr

    def test_a_measure_that_is_registered_is_measured_and_counted(self, tmp_path, monkeypatch):
        class Size(Measure):
            name = "size"

            def trainings(self, shared):
                return shared.model_estimates

            def run(self, shared):
                sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in shared.models.items()}
                return [SimpleNamespace(to_dict=lambda: sizes)]

        monkeypatch.setitem(MEASURES, "size", Size())
        asked = ("compare", "--method", "Random", "--preset", "smoke", "--measure", "size", "--models", 2)
        where = ("--store", tmp_path / "store", "--out", tmp_path, "--json", "--quiet")
        (estimate,) = json.loads(invoke(*asked, *where, "--dry-run").stdout)["estimates"]
        assert (estimate["purpose"], estimate["n_seeds"]) == ("attributed models", 2)
        results = json.loads(invoke(*asked, *where).stdout)
        (sizes,) = results["others"]["size"]
        assert list(sizes) == ["seed 0", "seed 1"]
        schema = Path(terminal.__file__).parent / "templates/results.schema.json"
        jsonschema.validate(results, json.loads(schema.read_text()))

    def test_unknown_methods_are_refused(self, store, tmp_path):
        result = invoke("compare", "--method", "STRID", "--store", store, "--out", tmp_path)
        assert result.exit_code == 2
        assert "Nearest: 'STRIDE'" in result.stderr


@pytest.mark.slow
def test_recovery_curve(store, tmp_path):
    result = invoke(
        "recovery-curve", "--preset", "smoke", "--n-subsets", 30, "--seeds", 2, "--models", 1,
        "--test-points", 40, "--store", store, "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    (point,) = results["points"]
    assert point["n_subsets"] == 30
    assert point["subset_size"] == 100
    assert {"lasso", "ridge", "closed_form_on_phi"} < point.keys()
    assert results["protocol"]["paper"]["name"] == "trained"


@pytest.mark.slow
def test_bench_recovery(tmp_path):
    result = invoke(
        "bench", "recovery", "--test-points", 4, "--n-subsets", 20, "--n-train", 300, "--subset-size", 30,
        "--reference", 2, "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "recovery.json").read_text())["rows"]


@pytest.mark.slow
def test_bench_core_divides_what_it_measures(monkeypatch):
    from stride_captum.evaluation.benchmarks import core

    seconds = {
        "forward": 2.0, "fit": 30.0, "product": 4.0, "scoring": 5.0, "dense": 10.0, "top100": 15.0,
        "single": 2.0, "ensemble": 60.0, "tracin_single": 100.0, "tracin_many": 40.0,
    }  # fmt: skip
    times = iter(seconds.values())

    def timed(work, repeats, device):
        work()
        return next(times)

    monkeypatch.setattr(core, "median_seconds", timed)
    row = core.bench_case(core.Case("width 512", 300, ("relu",), 10), repeats=1).to_dict()
    assert {name: row[name] for name in seconds} == seconds
    assert (row["n_features"], row["n_train"], row["n_test"]) == (512, 300, 10)
    assert row["fit_ratio"] == 3
    assert row["dense_ratio"] == 2
    assert row["top100_ratio"] == 3
    assert row["ensemble_ratio"] == 1.5
    assert row["single_speedup"] == 50
    assert row["many_speedup"] == 4


def test_the_module_runs_the_command_line(monkeypatch, capsys):
    import sys

    from stride_captum.__main__ import main

    monkeypatch.setattr(sys, "argv", ["stride-captum", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "explain" in capsys.readouterr().out


def test_missing_extras_are_named(monkeypatch):
    import sys

    from stride_captum.__main__ import main

    monkeypatch.setitem(sys.modules, "stride_captum.evaluation.cli.app", None)
    with pytest.raises(SystemExit, match=r'pip install "jinja2>=\S+" .*"typer>=\S+"$'):
        main()


class TestReproduce:
    few = ("--method", "Similarity", "--models", 1, "--test-points", 40, "--subsets", 8, "--jobs", 1)

    @pytest.fixture(autouse=True)
    @staticmethod
    def small_task(monkeypatch):
        small = load_task("synthetic", preset="smoke")
        monkeypatch.setattr(reproduce, "load_task", lambda *_, **__: small)

    def test_a_dry_run_counts_what_it_would_train_and_leaves_nothing(self, tmp_path):
        asked = ("reproduce", "table8", *self.few, "--store", tmp_path / "store", "--out", tmp_path / "out")
        result = invoke(*asked, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        models, found = json.loads(result.stdout)["estimates"]
        assert (models["purpose"], models["n_seeds"]) == ("attributed models", 1)
        points, counts = 10, 4
        assert found["n_subsets"] == 1 + points * counts
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "store").exists()

    @pytest.mark.parametrize("table", ["table1-mnist", "table9"])
    def test_more_than_two_hours_want_a_yes(self, table, tmp_path, monkeypatch):
        started = []
        estimate = retraining_estimate.RetrainingEstimate("a task", 100, 2, "processes", 0, 0, 1, 7300.0, 9)
        monkeypatch.setattr(comparison_run, "planned_trainings", lambda question: [estimate])

        def answer(question):
            started.append(1)
            raise ValueError("started")

        monkeypatch.setattr(comparison_run, "answer", answer)
        asked = ("reproduce", table, "--store", tmp_path / "store", "--out", tmp_path / "out")
        result = invoke(*asked)
        assert (result.exit_code, started) == (2, [])
        assert "`--yes` must be given for more than two hours of retraining; got 2.0 h" in result.stderr
        assert invoke(*asked, "--yes").exit_code == 2
        assert started == [1]

    @pytest.mark.slow
    def test_a_run_goes_on_as_it_was_asked(self, tmp_path):
        asked = ("reproduce", "table1-mnist", *self.few, "--store", tmp_path / "store", "--out", tmp_path)
        whole = invoke(*asked, "--quiet")
        assert whole.exit_code == 0, whole.output
        path = tmp_path / "table1-mnist-small" / "results.json"
        first = json.loads(path.read_text())
        path.unlink()
        again = invoke("reproduce", "table1-mnist", "--resume", "--out", tmp_path, "--quiet")
        assert again.exit_code == 0, again.output
        second = json.loads(path.read_text())
        for part in ("rows", "protocol", "paper"):
            assert second[part] == first[part]
