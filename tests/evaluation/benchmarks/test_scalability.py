"""The scalability benchmark: Table 5's models, limits that end a case, what is kept, and power laws."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from stride_captum import STRIDE, ClosedForm, Partition
from stride_captum.evaluation.benchmarks.scalability import measure as scalability_measure
from stride_captum.evaluation.benchmarks.scalability import process as scalability_process
from stride_captum.evaluation.benchmarks.scalability import scalability
from stride_captum.evaluation.benchmarks.scalability.case import (
    PHASES,
    SCALED_METHODS,
    Case,
    CaseResult,
    Outcome,
)
from stride_captum.evaluation.benchmarks.scalability.exponents import (
    CPU_LADDERS,
    FULL_LADDERS,
    fit_exponent,
    growth,
    ladder_cases,
)
from stride_captum.evaluation.benchmarks.scalability.measure import build, is_out_of_memory, measure
from stride_captum.evaluation.benchmarks.scalability.network import (
    ScalableCNN,
    channels,
    n_parameters,
    synthetic_images,
)
from stride_captum.evaluation.benchmarks.scalability.plot import scalability_plot
from stride_captum.evaluation.benchmarks.scalability.printed import PROPOSITION1, TABLE5
from stride_captum.evaluation.benchmarks.scalability.process import ended, run_case
from stride_captum.evaluation.benchmarks.scalability.report import show_scalability
from stride_captum.evaluation.benchmarks.scalability.scalability import bench_scalability, parse_size
from stride_captum.evaluation.cli.app import app
from stride_captum.evaluation.report.terminal import console

COUNTS = (
    261_450, 4_581_514, 7_155_370, 10_300_618, 18_744_458, 29_282_730, 42_161_866, 74_942_730, 150_444_298,
    299_684_362, 375_185_930, 450_687_498, 526_189_066, 601_690_634, 677_192_202, 752_693_770, 844_124_938,
    1_014_000_394,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_repetition(monkeypatch):
    monkeypatch.setattr(scalability_measure, "_REPEATS", 0)


def tiny(**changes):
    return Case(**{"method": "STRIDE", "depth": 3, "width": 2, "n_train": 60, "n_test": 2, **changes})


def raising(error):
    def fit(self, show_progress=False):
        raise error

    return fit


def result(case=None, setup=2.0, forward=1.0, query=0.5, peak=1024, n_params=100, **changes):
    return CaseResult(
        case or tiny(),
        n_params,
        forward=Outcome("ok", forward),
        setup=Outcome("ok", setup, peak),
        inference=Outcome("ok", query, peak),
        **changes,
    )


# The network.


@pytest.mark.parametrize(("row", "count"), list(zip(TABLE5, COUNTS, strict=True)))
def test_every_row_of_table_5_has_its_parameters(row, count):
    assert n_parameters(row.depth, row.width) == count


@pytest.mark.parametrize("row", TABLE5)
def test_with_batch_norm_every_row_rounds_to_what_table_5_prints(row):
    unit = {"K": 1e3, "M": 1e6, "B": 1e9}[row.params[-1]]
    digits = len(row.params[:-1].partition(".")[2])
    count = n_parameters(row.depth, row.width, batch_norm=True)
    assert f"{count / unit:.{digits}f}" == row.params[:-1]


def test_channels_double_after_every_two_layers_while_below_2048():
    assert channels(5, 512) == [512, 512, 1024, 1024, 2048]
    assert channels(9, 512)[-1] == 2048
    assert channels(8, 768) == [768, 768, 1536, 1536, 3072, 3072, 3072, 3072]
    assert channels(1, 7) == [7]


def test_the_network_has_nothing_but_convolutions_with_bias_and_a_head():
    model = ScalableCNN(5, 3)
    with_weights = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert [type(m) for m in with_weights] == [nn.Conv2d] * 5 + [nn.Linear]
    assert all(m.kernel_size == (3, 3) and m.bias is not None for m in with_weights[:-1])


@pytest.mark.parametrize("depth", [1, 2, 3, 9, 16])
def test_any_depth_takes_an_image(depth):
    sides = []
    model = ScalableCNN(depth, 1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: sides.append(output.shape[-1]))
    assert model(synthetic_images(2, 0)[0]).shape == (2, 10)
    assert min(sides) >= 4
    assert len(sides) == depth


def test_activations_keep_their_scale_over_24_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ScalableCNN(24, 1)  # 1 to 2,048 channels
    scales, x = [], synthetic_images(4, 0)[0]
    with torch.no_grad():
        for name, module in model.named_children():
            x = module(x)
            if name.startswith("relu"):
                scales.append(float(x.square().mean().sqrt()))
    assert len(scales) == 24
    # Few channels give few random weights: the scale moves most in the first layers.
    assert min(scales) > 0.05
    assert max(scales) < 20
    assert 1 / 3 < scales[-1] / scales[10] < 3


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (2.0, 4), (True, 4)])
def test_a_network_without_size_is_refused(sizes):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        ScalableCNN(*sizes)


# One case.


def test_a_case_measures_a_forward_pass_setup_and_query():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seen = []
    found = measure(tiny(), lambda kept: seen.append([getattr(kept, phase).status for phase in PHASES]))
    assert torch.equal(before, torch.get_rng_state())
    assert seen[0] == ["running", "not run", "not run"]
    assert seen[2] == ["ok", "running", "not run"]
    assert seen[-1] == ["ok", "ok", "ok"]
    assert found.n_params == n_parameters(3, 2)
    model = ScalableCNN(3, 2).eval()
    taps = STRIDE(model, torch.utils.data.TensorDataset(*synthetic_images(60, 0))).fit()._states[0].taps
    assert found.n_features == sum(tap.width for tap in taps)
    floor = found.forward.seconds + 2 * found.product_seconds
    assert found.floor_ratio == pytest.approx(found.setup.seconds / floor)
    assert found.fingerprint_seconds > 0
    assert CaseResult.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["STRIDE", "STRIDE paper"])
def test_what_a_process_does_once_is_done_before_setup_is_timed(monkeypatch, method):
    sizes, fit = [], STRIDE.fit

    def counting(self, show_progress=False):
        sizes.append(len(self.train_dataset))
        return fit(self, show_progress)

    monkeypatch.setattr(STRIDE, "fit", counting)
    measure(tiny(method=method, n_subsets=6, iterations=1))
    assert sizes == [12, 60]


def test_features_stand_for_a_model():
    found = measure(tiny(depth=0, width=7, method="STRIDE paper", n_subsets=5, iterations=2))
    assert (found.n_params, found.n_features) == (0, 7)
    assert [getattr(found, phase).status for phase in PHASES] == ["ok"] * 3
    assert found.floor_ratio is None


def test_the_methods_are_those_of_the_paper():
    data = torch.utils.data.TensorDataset(*synthetic_images(500, 0))
    model = ScalableCNN(1, 1)
    methods = [build(tiny(method=method, n_train=500), model, data) for method in SCALED_METHODS]
    assert [type(method).__name__ for method in methods] == ["STRIDE", "STRIDE", *SCALED_METHODS[2:]]
    assert methods[0].operators == ClosedForm()
    assert methods[1].operators.subsets == Partition(50, size=10)
    full = build(tiny(method="STRIDE paper", n_train=5000), model, data).operators
    assert (full.subsets.size, full.rank, full.iterations) == (100, 64, 200)
    limited = build(tiny(method="TracIn", memory_limit="8GiB"), model, data)
    assert limited.memory_budget == 2 * 2**30


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        OSError("[Errno 12] Cannot allocate memory"),
    ],
)
def test_running_out_of_memory_is_a_result(monkeypatch, error):
    monkeypatch.setattr(STRIDE, "fit", raising(error))
    found = measure(tiny())
    assert found.forward.status == "ok"
    assert found.setup.status == "out of memory"
    assert type(error).__name__ in found.setup.detail
    assert found.inference.status == "not run"
    assert found.ended_with("out of memory") == "setup"


def test_another_error_is_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr(STRIDE, "fit", raising(ValueError("out of memory of what it was")))
    found = measure(tiny())
    assert found.setup.status == "failed"
    assert found.setup.detail == "ValueError: out of memory of what it was"
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "EKFC"}, "`method` must be one of"),
        ({"method": "EKFAC", "depth": 0}, "`method` must be one of"),
        ({"last_phase": "fit"}, "`last_phase` must be one of"),
        ({"time_limit": 0}, "`time_limit` must be a positive number"),
        ({"memory_limit": "much"}, "`memory_limit` must be None or a number of bytes"),
    ],
)
def test_a_wrong_case_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


# Its process.


@pytest.mark.slow
def test_a_process_that_needs_more_memory_than_its_limit_says_so(tmp_path):
    found = run_case(tiny(depth=4, width=256, memory_limit="4MiB", n_train=50), tmp_path)
    assert found.ended_with("out of memory") == "forward"
    assert found.forward.seconds is None


@pytest.mark.slow
def test_a_phase_over_its_time_is_ended_and_what_was_measured_is_kept(tmp_path):
    case = tiny(depth=0, width=64, method="STRIDE paper", n_subsets=5, iterations=10**6, time_limit=0.5)
    found = run_case(case, tmp_path)
    assert found.forward.status == "ok"
    assert found.setup == Outcome("over time limit", detail="more than 0.5 s")
    assert json.loads((tmp_path / f"{case.name}.json").read_text())["setup"]["status"] == "over time limit"


class NoProcess:
    def __init__(self, target, args):
        pytest.fail("a case that is on disk was measured again")


def in_this_process(monkeypatch):
    """Cases are run here, without limits; the list of those that were."""
    ran = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.args = args

        def start(self):
            case, path = self.args
            ran.append(case)
            measure(case, lambda kept: scalability_process._write(path, kept))

        def join(self):
            pass

        kill = join

    class Context:
        def __init__(self, name):
            self.Process = Process

    monkeypatch.setattr(scalability_process.multiprocessing, "get_context", Context)
    return ran


@pytest.mark.slow
def test_a_case_on_disk_is_not_measured_again_but_another_one_is(tmp_path, monkeypatch):
    ran = in_this_process(monkeypatch)
    first = run_case(tiny(), tmp_path)
    assert run_case(tiny(), tmp_path) == first
    assert len(ran) == 1
    run_case(tiny(hardware="another machine"), tmp_path)
    assert len(ran) == 2


@pytest.mark.slow
@pytest.mark.parametrize("status", ["running", "failed"])
def test_a_case_that_was_cut_off_or_failed_is_measured_again(tmp_path, monkeypatch, status):
    ran = in_this_process(monkeypatch)
    cut = result()
    cut.inference = Outcome(status)
    scalability_process._write(tmp_path / f"{cut.case.name}.json", cut)
    assert run_case(cut.case, tmp_path).inference.status == "ok"
    (tmp_path / f"{cut.case.name}.json").write_text('{"case": 1')
    run_case(cut.case, tmp_path)
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("code", "status"),
    [(-signal.SIGALRM, "over time limit"), (-signal.SIGKILL, "out of memory"), (-signal.SIGSEGV, "failed")],
)
def test_the_phase_in_which_a_process_ended_gets_the_reason(code, status):
    cut = result()
    cut.setup, cut.inference = Outcome("running"), Outcome()
    found = ended(cut, code)
    assert [getattr(found, phase).status for phase in PHASES] == ["ok", status, "not run"]
    assert found.setup.detail
    assert ended(CaseResult(tiny()), code).forward.status == status


# Power laws.


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 1.5, 3.0])
def test_exact_power_laws_have_their_exponent_and_no_error(exponent):
    sizes = np.array([3, 10, 40, 1000])
    law = fit_exponent(sizes, 0.02 * sizes**exponent)
    assert law.exponent == pytest.approx(exponent, abs=1e-12)
    assert law.constant == pytest.approx(0.02)
    assert law.standard_error == pytest.approx(0, abs=1e-12)


def test_the_standard_error_is_that_of_a_regression_on_logarithms():
    from scipy.stats import linregress

    sizes, seconds = [1, 2, 5, 9, 30], [1.0, 2.5, 4.0, 11.0, 24.0]
    law, known = fit_exponent(sizes, seconds), linregress(np.log(sizes), np.log(seconds))
    assert law.exponent == pytest.approx(known.slope)
    assert law.standard_error == pytest.approx(known.stderr)
    assert fit_exponent([1, 2], [1, 4]).standard_error is None


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ([1, 2], [1, 0], "`seconds` must hold 2 positive numbers"),
        ([1, 2], [1], "`seconds` must hold 2 positive numbers"),
        ([-1, 2], [1, 1], "`sizes` must hold 2 positive numbers"),
        ([1, 2], [1, math.nan], "`seconds` must hold 2 positive numbers"),
        ([2, 2], [1, 3], "`sizes` must hold at least two different numbers"),
    ],
)
def test_what_has_no_power_law_is_refused(sizes, seconds, message):
    with pytest.raises(ValueError, match=message):
        fit_exponent(sizes, seconds)


@pytest.mark.parametrize("ladders", [CPU_LADDERS, FULL_LADDERS])
def test_a_sweep_changes_one_quantity_alone(ladders):
    sweeps = ladder_cases(ladders, SCALED_METHODS, {"n_test": 5})
    assert {quantity for _, quantity in sweeps} == {"N", "d", "K"}
    names = {"N": "n_train", "d": "width", "K": "n_subsets"}
    for (method, quantity), cases in sweeps.items():
        assert len(cases) >= 4
        for size, case in cases:
            assert (case.method, getattr(case, names[quantity]), case.n_test) == (method, size, 5)
            assert replace(case, **{names[quantity]: 1}) == replace(cases[0][1], **{names[quantity]: 1})
            if method == "STRIDE paper":  # the subsets fit, and more subsets draw more examples
                assert case.n_subsets * case.subset_size <= case.n_train
                assert case.n_subsets * (100 + case.subset_size) <= case.n_train
    assert {method for method, _ in ladder_cases(ladders, ["TracIn"], {})} == {"TracIn"}


def test_growth_puts_the_exponents_of_proposition_1_beside_the_fitted_ones():
    case = tiny(method="STRIDE paper")
    points = [(k, result(case, setup=3.0 * k, query=0.1, peak=8 * k**2)) for k in (2, 4, 8)]
    setup, query, memory = growth("STRIDE paper", "K", points)
    assert setup.law.exponent == pytest.approx(1)
    assert query.law.exponent == pytest.approx(0, abs=1e-12)
    assert memory.law.exponent == pytest.approx(2)
    assert (setup.stated, query.stated) == ("1", "1")
    assert PROPOSITION1["STRIDE"]["setup"]["d"] == "2"
    assert [one.stated for one in growth("TracIn", "N", points)] == ["-"] * 3
    assert growth("DiagonalEKFAC", "N", points)[1].stated == "1"
    costs = {one.cost: one for one in growth("STRIDE paper", "P", points)}
    assert costs["setup less forward"].values == (5.0, 11.0, 23.0)


def test_phases_without_figures_take_no_part_in_a_fit():
    lost = CaseResult(tiny(), setup=Outcome("out of memory"))
    setup = growth("STRIDE", "N", [(1, result(setup=1.0)), (2, result(setup=2.0)), (4, lost)])[0]
    assert setup.sizes == (1, 2)
    assert setup.law is None


# The sweep.


def scripted(monkeypatch, endings):
    """Cases end as `endings` say, by method, size and phase; the cases that were run."""
    ran = []

    def run(case, folder):
        ran.append(case)
        found = result(case, setup=float(case.width), n_params=n_parameters(case.depth, case.width))
        if case.last_phase == "setup":
            found.inference = Outcome()
        for phase in PHASES:
            status = endings.get((case.method, case.width, phase))
            if status is not None and getattr(found, phase).ok:
                setattr(found, phase, Outcome(status, detail="said why"))
                for later in PHASES[PHASES.index(phase) + 1 :]:
                    setattr(found, later, Outcome())
        return found

    monkeypatch.setattr(scalability, "run_case", run)
    return ran


def sweep(tmp_path, **changes):
    options = {"sizes": [(2, 8), (2, 2), (2, 4)], "device": "cpu", "exponents": False, "n_train": 60}
    return bench_scalability(tmp_path, **{**options, **changes})


def test_models_come_by_their_parameters_and_every_method_is_run(tmp_path, monkeypatch):
    ran = scripted(monkeypatch, {})
    lines = []
    found = sweep(tmp_path, say=lines.append)
    assert [case.width for case in ran] == [2, 4, 8] * len(SCALED_METHODS)
    assert len(lines) == len(ran)
    assert [r.case.width for r in found.results] == [w for w in (2, 4, 8) for _ in SCALED_METHODS]
    assert {one.quantity for one in found.growth} == {"P"}
    assert all(case.memory_limit == "8GiB" and case.hardware for case in ran)


def test_out_of_memory_is_tried_on_every_model_and_the_first_is_named(tmp_path, monkeypatch):
    endings = {("EKFAC", width, "setup"): "out of memory" for width in (4, 8)}
    ran = scripted(monkeypatch, endings)
    found = sweep(tmp_path, methods=["EKFAC"])
    assert len(ran) == 3
    assert found.first("out of memory")["EKFAC"].case.width == 4
    assert found.first("over time limit") == {}


def test_what_was_over_time_is_not_tried_on_larger_models_and_says_so(tmp_path, monkeypatch):
    ran = scripted(monkeypatch, {("EKFAC", 4, "setup"): "over time limit"})
    found = sweep(tmp_path, methods=["EKFAC", "TracIn"])
    assert [case.width for case in ran if case.method == "EKFAC"] == [2, 4]
    last = [r for r in found.results if r.case.method == "EKFAC"][-1]
    assert last.n_params == n_parameters(2, 8)
    assert last.setup == Outcome("not run", detail="setup was over the time limit with 2 x 4")
    assert len(found.results) == 6


def test_setup_goes_on_where_only_the_query_was_over_time(tmp_path, monkeypatch):
    ran = scripted(monkeypatch, {("TracIn", 2, "inference"): "over time limit"})
    found = sweep(tmp_path, methods=["TracIn"])
    assert [case.last_phase for case in ran] == ["inference", "setup", "setup"]
    assert [r.setup.seconds for r in found.results] == [2, 4, 8]
    assert [r.inference.detail for r in found.results[1:]] == [
        "inference was over the time limit with 2 x 2"
    ] * 2


def test_full_is_table_5(tmp_path, monkeypatch):
    ran = scripted(monkeypatch, {})
    found = sweep(tmp_path, full=True, sizes=None, n_train=None, methods=["STRIDE"])
    assert [(case.depth, case.width) for case in ran] == [(row.depth, row.width) for row in TABLE5]
    assert {(case.n_train, case.n_test) for case in ran} == {(5000, 100)}
    assert [r.n_params for r in found.results] == list(COUNTS)


def test_the_sweep_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="`methods` must be one of"):
        sweep(tmp_path, methods=["EKFC"])
    with pytest.raises(ValueError, match="`n_train` must be at least 50"):
        sweep(tmp_path, n_train=10)
    with pytest.raises(ValueError, match="`size` must be depth x width"):
        parse_size("4*64")


@pytest.mark.slow
def test_the_command_prints_ratios_and_writes_figures_and_plot(tmp_path, monkeypatch):
    endings = {("EKFAC", 16, "setup"): "out of memory", ("TracIn", 16, "setup"): "over time limit"}
    scripted(monkeypatch, endings)
    monkeypatch.setattr(console, "_width", 160)
    sizes = [word for size in ("2x2", "2x16", "4x64") for word in ("--size", size)]
    arguments = [
        "bench",
        "scalability",
        "--device",
        "cpu",
        "--train",
        "60",
        "--no-exponents",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*arguments, *sizes])
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "First out of memory of EKFAC: setup with 2 x 16 (said why)" in printed
    assert "Not run: TracIn with 4 x 64, because setup was over the time limit with 2 x 16" in printed
    assert "3.27" in printed
    assert "6.43" in printed
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["results"]) == 3 * len(SCALED_METHODS)
    assert written["paper"]["table5"][0]["stride"] == "3.27"
    ElementTree.fromstring((tmp_path / "scalability.svg").read_text())


def test_every_table_takes_a_method_that_was_not_asked_for(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, {("STRIDE", 4, "setup"): "out of memory"})
    monkeypatch.setattr(console, "_width", 160)
    found = sweep(tmp_path, methods=["STRIDE"])
    found.results[0].product_seconds = 0.25
    with console.capture() as shown:
        show_scalability(found)
    row = next(line for line in shown.get().splitlines() if "2 x 2" in line)
    assert [cell.strip() for cell in row.split("│")[3:6]] == ["1", "2", "1.33"]
    assert "OOM" in shown.get()


def test_the_plot_marks_failures_and_shows_the_paper(tmp_path, monkeypatch):
    scripted(monkeypatch, {("EKFAC", 4, "setup"): "out of memory", ("TracIn", 8, "setup"): "over time limit"})
    svg = scalability_plot(sweep(tmp_path).results)
    texts = [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"M", "T", "parameters", *SCALED_METHODS, "paper: STRIDE (H100)", "paper: EKFAC (H100)"} <= set(
        texts
    )


def test_nothing_is_measured_with_warnings_of_the_paper_s_coverage():
    case = tiny(depth=0, width=4, method="STRIDE paper", n_subsets=3, subset_size=5, iterations=1)
    assert scalability_measure.measure(case).setup.ok  # warnings are errors here
