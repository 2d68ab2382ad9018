"""kvarn.env: what each variable may say, and that nonsense is refused by name."""

from collections.abc import Callable

import pytest

from kvarn import env
from kvarn.errors import KVarNError

FLAGS: dict[str, Callable[[], bool]] = {
    "KVARN_CANONICAL": env.canonical,
    "KVARN_SCRUB": env.scrub,
    "KVARN_FORCE_TRITON": env.force_triton,
    "KVARN_ALLOW_UNTESTED_ENGINE": env.allow_untested_engine,
    "KVARN_SGLANG_HOOKS": env.sglang_hooks,
}
every_flag = pytest.mark.parametrize(("name", "read"), FLAGS.items(), ids=FLAGS)


@every_flag
def test_unset_flag_is_off(name: str, read: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert read() is False


@every_flag
def test_flag_is_read_at_every_call(name: str, read: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for value, meaning in (("1", True), ("0", False), ("1", True)):
        monkeypatch.setenv(name, value)
        assert read() is meaning


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "Yes", "on", " 1 "])
def test_ways_to_say_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_CANONICAL", value)
    assert env.canonical() is True


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF", "", "  "])
def test_ways_to_say_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_CANONICAL", value)
    assert env.canonical() is False


@pytest.mark.parametrize("value", ["2", "-1", "enable", "1.0", "o n"])
@every_flag
def test_flag_that_is_no_switch_is_refused_by_name(
    name: str, read: Callable[[], bool], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(KVarNError, match=rf"^{name}='{value}' is not a switch; set it to 1 or 0\.$"):
        read()


@pytest.mark.parametrize(
    ("value", "tokens"), [("0", 0), ("128", 128), (" 64 ", 64), ("007", 7), ("", None), (" ", None)]
)
def test_tail_tokens_are_a_count_or_unset(value: str, tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_TAIL_TOKENS", value)
    assert env.tail_tokens() == tokens


def test_unset_tail_tokens_leave_it_to_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVARN_TAIL_TOKENS", raising=False)
    assert env.tail_tokens() is None


@pytest.mark.parametrize("value", ["-1", "+5", "1.5", "1e3", "128 tokens", "all", "0x10"])
def test_tail_tokens_that_are_no_count_are_refused_by_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_TAIL_TOKENS", value)
    with pytest.raises(KVarNError, match="^KVARN_TAIL_TOKENS=.* is not a number of tokens; set it to 0 or more"):
        env.tail_tokens()


def test_superscript_digit_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_TAIL_TOKENS", "²")
    with pytest.raises(KVarNError, match="KVARN_TAIL_TOKENS"):
        env.tail_tokens()


@pytest.mark.parametrize(("value", "bits"), [("", 16), ("16", 16), (" 8 ", 8)])
def test_rope_bits(value, bits, monkeypatch):
    monkeypatch.setenv("KVARN_ROPE_BITS", value)
    assert env.rope_bits() == bits


def test_other_rope_bits_are_an_error(monkeypatch):
    monkeypatch.setenv("KVARN_ROPE_BITS", "4")
    with pytest.raises(KVarNError, match="KVARN_ROPE_BITS='4' is no width of the rope part; set it to 16 or 8"):
        env.rope_bits()


def test_requested_hooks_are_seen_by_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_SGLANG_HOOKS", "0")
    env.request_sglang_hooks()
    assert env.sglang_hooks() is True
