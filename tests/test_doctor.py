"""The doctor: it passes what works, and names what is broken, what to do, and what it has not looked at."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
import torch

from stride_captum import STRIDE, doctor
from stride_captum.adapters import Similarity
from stride_captum.conformance import CHECKS, Subject, shipped
from stride_captum.conformance.toy_problems import trained
from stride_captum.doctor import diagnose
from stride_captum.system import packages as installed
from stride_captum.system.packages import EXTRAS, check_extra, check_packages, requirements


class WithTheWrongSign(Similarity):
    def score_columns(self, state, prepared, columns):
        return -super().score_columns(state, prepared, columns)


def needs_what_is_not_there(model, train, **options):
    raise ImportError("KFAC needs kfac: pip install kfac")


@pytest.fixture
def requires(monkeypatch):
    """Replaces what the package says that it requires, and the versions that are installed."""

    def replace(*texts, **versions):
        def version(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        versions["stride-captum"] = "0.1.0"
        monkeypatch.setattr(metadata, "requires", lambda name: list(texts))
        monkeypatch.setattr(metadata, "version", version)

    return replace


class TestMethods:
    @pytest.fixture(scope="class")
    @classmethod
    def mixed(cls):
        return diagnose(
            [
                Subject("Similarity", Similarity),
                Subject("Wrong", WithTheWrongSign),
                Subject("KFAC", needs_what_is_not_there),
            ]
        )

    @pytest.mark.slow
    def test_a_method_that_keeps_its_laws_is_ok(self, mixed):
        (finding,) = [f for f in mixed.findings if f.what == "Similarity"]
        assert finding.status == "ok"
        assert f"{len(CHECKS) - len(doctor.LEFT_OUT)} laws" in finding.detail

    @pytest.mark.slow
    def test_a_method_that_breaks_one_is_named_with_the_law_and_the_remedy(self, mixed):
        (finding,) = [f for f in mixed.findings if f.what == "Wrong"]
        assert finding.status == "broken"
        assert "examples of the class raise its margin? No" in finding.detail
        assert "doctor --json" in (finding.remedy or "")
        assert not mixed.ok
        assert "Broken: Wrong" in str(mixed)

    @pytest.mark.slow
    def test_a_method_without_its_extra_is_absent_and_not_covered(self, mixed):
        (finding,) = [f for f in mixed.findings if f.what == "KFAC"]
        assert (finding.status, finding.detail) == ("absent", "KFAC needs kfac: pip install kfac")
        assert "KFAC" in mixed.not_covered[0]

    @pytest.mark.slow
    def test_exceptions_of_a_method_are_not_held_against_it(self):
        of_signs = ("class", "self_influence", "products")
        laws = [law for law in CHECKS if any(part in law for part in of_signs)]
        reasons = dict.fromkeys(laws, "the sign is wrong on purpose")
        assert diagnose([Subject("Wrong", WithTheWrongSign, reasons)]).ok

    def test_it_names_the_laws_that_it_leaves_out(self, mixed):
        for law in doctor.LEFT_OUT:
            assert law in CHECKS
            assert law.replace("_", " ") in str(mixed)

    def test_all_methods_that_ship_are_looked_at(self, monkeypatch):
        monkeypatch.setattr(doctor, "check_method", lambda subject: doctor.Finding(subject.name, "ok", "yes"))
        names = {finding.what for finding in diagnose().findings}
        assert {subject.name for subject in shipped()} < names


class TestTraining:
    def test_a_network_that_learns_is_ok(self):
        finding = doctor.check_training()
        assert (finding.what, finding.status) == ("training", "ok")
        assert any(f.what == "training" for f in diagnose([]).findings)

    def test_one_at_chance_level_is_broken(self, monkeypatch):
        def untrained(build):
            model, train, test = trained(build)
            for parameter in list(model.modules())[-1].parameters():
                parameter.data.zero_()
            return model, train, test

        monkeypatch.setattr(doctor, "trained", untrained)
        diagnosis = diagnose([])
        (finding,) = [f for f in diagnosis.findings if f.what == "training"]
        assert finding.status == "broken"
        assert re.search(r"has learned nothing: it is right for \d+.\d% of its training", finding.detail)
        assert not diagnosis.ok


class TestPackages:
    def test_this_installation_is_whole(self):
        assert [f for f in check_packages() if f.status == "broken"] == []

    def test_a_package_that_is_too_old_is_broken(self, requires):
        requires("captum>=0.8", "torch>=2.2", captum="0.7.0", torch="2.4.1+cu121")
        broken = [str(f) for f in check_packages() if f.status == "broken"]
        assert broken == [
            'BROKEN captum: captum>=0.8 is needed, 0.7.0 is installed. Run `pip install "captum>=0.8"`.'
        ]

    def test_a_package_that_is_missing_is_broken(self, requires):
        requires("captum>=0.8")
        assert "captum>=0.8 is needed, none is installed" in str(check_packages()[0])

    def test_an_extra_that_is_missing_is_absent(self, requires):
        requires("captum>=0.8", 'kronfluence>=1.0.1; extra == "kronfluence"', captum="0.9.0")
        finding = check_extra("kronfluence")
        assert finding.status == "absent"
        assert finding.remedy == 'Run `pip install "kronfluence>=1.0.1"`.'

    def test_an_extra_in_another_version_is_broken(self, requires):
        requires('cleanlab>=2.6; extra == "cleanlab"', cleanlab="2.0")
        finding = check_extra("cleanlab")
        assert finding.status == "broken"
        assert "cleanlab>=2.6 is needed, 2.0 is installed" in finding.detail

    def test_an_extra_that_cannot_be_imported_is_broken(self, requires, monkeypatch):
        requires('cleanlab>=2.6; extra == "cleanlab"', cleanlab="2.7")
        monkeypatch.setitem(EXTRAS, "cleanlab", ("a detector", "no_such_module"))
        finding = check_extra("cleanlab")
        assert finding.status == "broken"
        assert re.search("importing it fails: ModuleNotFoundError.*no_such_module", finding.detail)

    def test_a_package_that_is_not_installed_says_how_to(self, monkeypatch):
        monkeypatch.setattr(installed, "PACKAGE", "no-such-package")
        (finding,) = check_packages()
        assert finding.status == "broken"
        assert "pip install" in (finding.remedy or "")

    def test_every_extra_for_users_is_known(self):
        known = set(metadata.metadata("stride-captum").get_all("Provides-Extra") or [])
        assert set(EXTRAS) <= known
        for name in EXTRAS:
            assert requirements(name)


class TestDevices:
    def test_an_accelerator_that_agrees_is_ok(self):
        assert doctor.check_device("cpu").status == "ok"

    def test_one_that_is_not_there_is_broken(self, monkeypatch):
        absent = "cuda:99"
        monkeypatch.setattr(doctor, "accelerators", lambda: [absent])
        diagnosis = diagnose([])
        (finding,) = [f for f in diagnosis.findings if f.what == absent]
        assert finding.status == "broken"
        assert "device='cpu'" in (finding.remedy or "")
        assert diagnosis.devices == ["cpu", absent]
        assert not diagnosis.ok

    @pytest.mark.parametrize("factor", [1.01, float("nan")])
    def test_one_that_computes_other_scores_is_broken(self, monkeypatch, factor):
        class Computes(STRIDE):
            def score_columns(self, state, prepared, columns):
                scores = super().score_columns(state, prepared, columns)
                return scores if self.device is None else scores * factor

        monkeypatch.setattr(doctor, "STRIDE", Computes)
        finding = doctor.check_device("cpu")
        assert finding.status == "broken"
        assert "differ from the CPU's" in finding.detail

    def test_accelerators_are_those_of_torch(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert doctor.accelerators() == ["cuda:0", "cuda:1"]


class TestTheCommand:
    @pytest.fixture
    def subjects(self, monkeypatch):
        def replace(*subjects):
            monkeypatch.setattr(doctor, "shipped", lambda: list(subjects))

        return replace

    @pytest.mark.slow
    def test_it_returns_0_and_prints_versions(self, subjects, capsys):
        subjects(Subject("Similarity", Similarity))
        assert doctor.main([]) == 0
        out, err = capsys.readouterr()
        assert f"torch {metadata.version('torch')}" in out
        assert "+ Similarity: keeps" in out
        assert "Not covered:" in out
        assert "methods" in err

    @pytest.mark.slow
    def test_it_returns_1_where_something_is_broken(self, subjects, capsys):
        subjects(Subject("Wrong", WithTheWrongSign))
        assert doctor.main(["--json"]) == 1
        out, err = capsys.readouterr()
        diagnosis = json.loads(out)
        assert diagnosis["ok"] is False
        assert [f["what"] for f in diagnosis["findings"] if f["status"] == "broken"] == ["Wrong"]
        assert diagnosis["versions"].keys() > {"python", "torch", "captum", "stride-captum"}
        assert diagnosis["not_covered"]
        assert err == ""
