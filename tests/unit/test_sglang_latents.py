"""Latents in SGLang without a server: which models attend to expanded keys, and what is asked of the backend."""

import sys
from types import SimpleNamespace

import pytest

from kvarn.sglang_backend import compat, compat_hooks
from kvarn.sglang_backend.compat_tables import BACKEND_NAME

torch = pytest.importorskip("torch")
MODELS = "sglang.srt.models"


class Attention:
    """SGLang's attention over latents, as far as it is looked at."""

    qk_head_dim, qk_nope_head_dim, v_head_dim = 5, 3, 4
    rotary_emb = None

    def dispatch_attn_forward_method(self):
        """Ask the backend's handler."""


class OwnChoice(Attention):
    """Attention of a model that chooses for itself."""

    def dispatch_attn_forward_method(self):
        """Ask nobody."""


def widths(monkeypatch, *layers, **config):
    monkeypatch.setitem(sys.modules, f"{MODELS}.deepseek_v2", SimpleNamespace(DeepseekV2AttentionMLA=Attention))
    model = SimpleNamespace(modules=lambda: [object(), *layers])
    runner = SimpleNamespace(model=model, model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**config)))
    return compat.expanded_widths(runner)


def test_models_are_expanded_unless_they_choose_or_scale_queries_for_themselves(monkeypatch):
    assert widths(monkeypatch, Attention(), Attention()) == (5, 4)
    assert widths(monkeypatch, Attention(), OwnChoice()) is None
    assert widths(monkeypatch, Attention(), llama_4_scaling={"beta": 0.1}) is None
    assert widths(monkeypatch) is None


def test_handler_asks_the_backend_in_every_step(monkeypatch):
    handlers, methods = {}, SimpleNamespace(MLA="absorbed", MHA="expanded")
    module = SimpleNamespace(
        AttentionBackendRegistry=SimpleNamespace(register=handlers.__setitem__), AttnForwardMethod=methods
    )
    monkeypatch.setitem(sys.modules, f"{MODELS}.deepseek_common.attention_backend_handler", module)
    answers = iter([True, False, True])
    compat_hooks.choose_latent_attention(lambda: next(answers))
    asked = [handlers[BACKEND_NAME](Attention(), None) for _ in range(3)]
    assert asked == ["expanded", "absorbed", "expanded"]


@pytest.mark.parametrize("turns", [True, False])
def test_queries_and_rope_parts_are_turned_where_the_model_does(turns):
    q, rope = torch.ones(2, 1, 5), torch.ones(2, 1, 2)
    attention = Attention()
    if turns:
        attention.rotary_emb = lambda positions, q, k: (q * positions[:, None, None], k * -positions[:, None, None])
    found = compat.turn(attention, torch.tensor([2, 3]), q, q[..., 3:], rope)
    assert q[:, 0].tolist() == ([[1, 1, 1, 2, 2], [1, 1, 1, 3, 3]] if turns else [[1] * 5] * 2)
    assert found[:, 0].tolist() == ([[-2, -2], [-3, -3]] if turns else [[1, 1], [1, 1]])
