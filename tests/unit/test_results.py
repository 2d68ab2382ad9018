"""Result files: a run that is killed while it writes leaves what it had."""

from pathlib import Path

import pytest

from kvarn import results


def test_a_write_that_is_cut_off_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "rows.json"
    assert results.read(path) == []
    results.write(path, [{"a": 1}])
    whole = Path.write_text

    def cut_off(self: Path, text: str) -> int:
        whole(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        results.write(path, [{"a": 2}])
    assert results.read(path) == [{"a": 1}]


def test_commands_tell_what_changes_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_ROPE_BITS", "8")
    monkeypatch.setenv("KVARN_CANONICAL", "")
    command = results.provenance()["command"]
    assert "KVARN_ROPE_BITS=8" in command.split(" python ")[0]
    assert "KVARN_CANONICAL" not in command
