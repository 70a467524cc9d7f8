"""How the command line behaves: help by example, completion, what goes to stdout, errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from stride_captum.doctor import Diagnosis
from stride_captum.evaluation.cli import app as cli
from stride_captum.evaluation.cli.app import app
from stride_captum.evaluation.cli.output import Console, one_sentence_errors
from stride_captum.evaluation.comparison.shared.methods import METHODS
from stride_captum.evaluation.retraining import workers as retraining_workers
from stride_captum.evaluation.tasks.paper_tables import TABLES
from stride_captum.system.packages import Finding

runner = CliRunner()
SMALL = [
    "compare", "--preset", "smoke", "--method", "Similarity", "--method", "Random", "--measure", "lds",
    "--subsets", "4", "--seeds", "1", "--models", "1", "--test-points", "20", "--jobs", "1",
    "--engine", "processes",
]  # fmt: skip


def invoke(*arguments, **options):
    return runner.invoke(app, [str(a) for a in arguments], **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def commands(group=None, path=()):
    """Every command and group by its words, the whole program first."""
    group = get_command(app) if group is None else group
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = list(commands())


def examples_of(command):
    text = command.help or ""
    assert re.search(r"\bExamples?:", text), text
    return re.findall(r"stride-captum [^\n]+", text.split("Example", 1)[1])


class TestHelp:
    @pytest.mark.parametrize(("path", "command"), COMMANDS)
    def test_every_help_has_an_example_of_that_command(self, path, command):
        examples = examples_of(command)
        assert examples
        for example in examples:
            assert tuple(shlex.split(example)[1 : 1 + len(path)]) == path

    @pytest.mark.parametrize("example", [e.strip() for _, command in COMMANDS for e in examples_of(command)])
    @pytest.mark.slow
    def test_every_example_can_be_parsed(self, example):
        command, words = get_command(app), shlex.split(example)[1:]
        context = command.make_context("stride-captum", list(words))
        while hasattr(command, "commands"):
            name, command, words = command.resolve_command(context, words)
            context = command.make_context(name, list(words), parent=context)

    @pytest.mark.slow
    @pytest.mark.parametrize(("path", "command"), COMMANDS)
    def test_help_prints_it(self, path, command):
        result = invoke(*path, "--help", env={"COLUMNS": "160"})
        assert result.exit_code == 0
        assert examples_of(command)[0].strip() in result.output


class TestCompletion:
    def completed(self, shell, *words):
        line = shlex.join(["stride-captum", *words])
        environment = {
            "_STRIDE_CAPTUM_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words)),
            "_TYPER_COMPLETE_ARGS": line,
        }
        return invoke(env=environment, prog_name="stride-captum").stdout

    def test_it_can_be_installed(self):
        assert "--install-completion" in invoke("--help").output

    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            (["explain", "--task", "d"], ["digits", "diabetes", "digit-pairs"]),
            (["compare", "--preset", "s"], ["smoke", "small"]),
            (["compare", "--measure", "l"], ["lds", "linearized", "leakage"]),
            (["compare", "--measure", "a"], ["all"]),
            (["compare", "--method", "Trac"], [n for n in METHODS if n.startswith("TracIn")]),
            (["compare", "--engine", "st"], ["stacked"]),
            (["reproduce", "table1"], [n for n in TABLES if n.startswith("table1")]),
            (["reproduce", "table8", "--method", "Class"], ["ClassSimilarity", "ClassRandom"]),
            (["recovery-curve", "--paper", "c"], ["cifar10"]),
            (["bench", "retraining", "--case", "d"], ["digits"]),
            (["bench", "retraining", "--device", "m"], ["mps"]),
            (["explain", "--device", "c"], ["cpu", "cuda"]),
        ],
    )
    def test_names_complete(self, words, wanted):
        found = self.completed("bash", *words).splitlines()
        assert [name.replace("\\", "") for name in found] == wanted

    def test_bash_gets_one_word_a_name(self):
        for name in self.completed("bash", "compare", "--method", "STRIDE").splitlines():
            (word,) = shlex.split(name)
            assert word in METHODS

    def test_zsh_gets_names_as_they_are(self):
        assert '"STRIDE (tuned)"' in self.completed("zsh", "compare", "--method", "STRIDE (")


class TestOutput:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "arguments",
        [
            ["explain", "--preset", "smoke", "--index", "3"],
            SMALL,
            ["bench", "recovery", "--test-points", "2", "--n-subsets", "10", "--n-train", "60",
             "--subset-size", "6", "--reference", "1"],
        ],
        ids=lambda arguments: arguments[0],
    )  # fmt: skip
    def test_json_is_all_that_stdout_has(self, arguments, store, tmp_path):
        kept = [] if arguments[0] == "bench" else ["--store", store]
        result = invoke(*arguments, *kept, "--out", tmp_path, "--json")
        assert result.exit_code == 0, result.output
        (file,) = [path for path in tmp_path.glob("*.json") if path.name != "asked.json"]
        assert json.loads(result.stdout) == json.loads(file.read_text())
        assert ("Report: " in result.stderr) is bool(kept)

    @pytest.mark.slow
    def test_quiet_and_json_leave_nothing_but_the_results(self, store, tmp_path):
        result = invoke(*SMALL, "--store", store, "--out", tmp_path, "--json", "--quiet")
        assert json.loads(result.stdout)["rows"]
        assert result.stderr == ""

    @pytest.mark.slow
    def test_quiet_prints_nothing(self, store, tmp_path):
        result = invoke(*SMALL, "--store", store, "--out", tmp_path, "--quiet")
        assert result.exit_code == 0
        assert result.output == ""

    def test_a_dry_run_in_json(self, store, tmp_path):
        result = invoke(*SMALL, "--store", store, "--out", tmp_path, "--dry-run", "--json")
        estimates = json.loads(result.stdout)["estimates"]
        assert [(e["n_subsets"], e["n_seeds"]) for e in estimates] == [(4, 1), (1, 1)]

    @pytest.mark.parametrize(("path", "command"), COMMANDS)
    def test_all_commands_can_be_quiet_and_all_that_measure_speak_json(self, path, command):
        options = {name for parameter in command.params for name in parameter.opts}
        if not hasattr(command, "commands"):
            assert "--quiet" in options
            assert "--json" in options or path == ("report",)  # its result is a page

    def test_notes_go_where_they_should(self, capsys):
        for voice, stream in ((Console(), 0), (Console(as_json=True), 1)):
            voice.note("by the way")
            said = capsys.readouterr()
            assert said[stream].strip() == "by the way"
            assert said[1 - stream] == ""
        Console(quiet=True).note("by the way")
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("text", ["Report: out/[bold]x[/bold]/report.html", "Report: out/[/]"])
    def test_a_path_with_brackets_is_said_as_it_is(self, text, capsys):
        Console().note(text)
        assert capsys.readouterr().out.strip() == text

    def test_a_path_that_is_not_unicode_can_be_said(self, capsys):
        Console().note(f"Report: {os.fsdecode(b'f' + bytes([246]) + b'lder')}")
        assert capsys.readouterr().out.strip() == "Report: f?lder"


class TestDoctor:
    @pytest.fixture
    def found(self, monkeypatch):
        def replace(status):
            finding = Finding("TracIn", status, "as it is", "Do something.")
            diagnosis = Diagnosis({"python": "3"}, ["cpu"], [finding], ["much"], 1.0)
            monkeypatch.setattr(cli, "diagnose", lambda show_progress: diagnosis)

        return replace

    def test_it_says_what_is_broken_and_what_to_do(self, found):
        found("broken")
        result = invoke("doctor")
        assert result.exit_code == 1
        assert "BROKEN TracIn: as it is. Do something." in result.stdout

    def test_what_is_absent_is_no_fault(self, found):
        found("absent")
        result = invoke("doctor", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["findings"][0]["status"] == "absent"

    def test_it_needs_no_extra(self, monkeypatch, capsys):
        from stride_captum import doctor
        from stride_captum.__main__ import main

        monkeypatch.setitem(sys.modules, "stride_captum.evaluation.cli.app", None)
        monkeypatch.setattr(doctor, "shipped", list)
        monkeypatch.setattr(sys, "argv", ["stride-captum", "doctor", "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
        findings = json.loads(capsys.readouterr().out)["findings"]
        found = {finding["what"]: finding["status"] for finding in findings}
        assert found["extra eval"] == "broken"  # its packages are there and its module is not
        assert stopped.value.code == 1


class TestErrors:
    def test_a_results_file_that_is_not_there(self, tmp_path):
        result = invoke("report", tmp_path / "nowhere.json")
        assert result.exit_code == 2
        assert re.fullmatch(
            r"Error: No such file or directory: \S+nowhere\.json\. Name [^.]+\.\n", result.stderr
        )

    def test_a_folder_that_is_a_file(self, store, tmp_path):
        (tmp_path / "file").write_text("")
        result = invoke(
            "explain", "--preset", "smoke", "--store", store, "--out", tmp_path / "file", "--quiet"
        )
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: File exists: ")

    @pytest.mark.parametrize(
        "error", [ValueError, TypeError, IndexError, RuntimeError, ImportError, OSError, FileNotFoundError]
    )
    def test_what_a_user_can_mend_is_one_sentence(self, error, capsys):
        with pytest.raises(cli.typer.Exit) as stopped, one_sentence_errors():
            raise error("`k` must be positive; got -1. Leave it out.")
        assert stopped.value.exit_code == 2
        assert capsys.readouterr().err == "Error: `k` must be positive; got -1. Leave it out.\n"

    def test_what_nobody_foresaw_keeps_its_traceback(self):
        with pytest.raises(AssertionError), one_sentence_errors():
            raise AssertionError

    def test_one_command_may_call_another(self, capsys):
        with pytest.raises(cli.typer.Exit) as stopped, one_sentence_errors(), one_sentence_errors():
            raise ValueError("once")
        assert stopped.value.exit_code == 2
        assert capsys.readouterr().err == "Error: once\n"


class TestInterruption:
    @pytest.fixture
    def runs(self, monkeypatch):
        """Counts retrainings; the third is interrupted, once."""
        write, counts = retraining_workers.write_runs, []

        def counted(path, **arguments):
            counts.append(path)
            if len(counts) == 3:
                raise KeyboardInterrupt
            write(path, **arguments)

        monkeypatch.setattr(retraining_workers, "write_runs", counted)
        return counts

    @pytest.mark.slow
    def test_the_same_command_goes_on_where_ctrl_c_stopped_it(self, runs, tmp_path, monkeypatch):
        arguments = [*SMALL, "--store", str(tmp_path / "my store"), "--out", str(tmp_path / "out"), "--quiet"]
        monkeypatch.setattr(sys, "argv", ["stride-captum", *arguments])
        first = invoke(*arguments)
        assert first.exit_code == 130
        assert f"kept in {tmp_path / 'my store'}" in first.stderr
        assert len(runs) == 3
        command = first.stderr.strip().rpartition("Continue with: ")[2]
        again = invoke(*shlex.split(command)[1:])
        assert again.exit_code == 0, again.output
        assert len(runs) == 3 + 2  # of four, two were finished

    def test_where_nothing_is_kept_it_says_so(self, capsys):
        with pytest.raises(cli.typer.Exit) as stopped, one_sentence_errors():
            raise KeyboardInterrupt
        assert stopped.value.exit_code == 130
        assert capsys.readouterr().err == "Interrupted. Nothing was kept: the same command starts over.\n"
