"""`kvarn doctor`: what is in the way of an engine is said, with what to do."""

import pytest

from kvarn.cli import doctor
from kvarn.cli.main import main


def test_a_tested_engine_that_finds_the_plugin_has_no_problem():
    assert doctor.engine_problems("vLLM", "0.33.0+cpu", ("0.32.0", "0.33.0"), ["kvarn"]) == []


def test_everything_that_is_in_the_way_is_said():
    version, plugin = doctor.engine_problems("SGLang", "0.4.0", ("0.5.23",), ["other"])
    assert "0.4.0" in version
    assert "0.5.23" in version
    assert "pip" in plugin


@pytest.mark.parametrize("installed", [None, "0.0.1"])
def test_command_fails_without_an_engine_that_fits(installed, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda _: installed)
    assert main(["doctor"]) == 1
    assert "install" in capsys.readouterr().err
