"""torch's attention with learned sinks against plain softmax in float64."""

from types import SimpleNamespace

import pytest
import torch

from kvarn.core.learned_sinks import sdpa_with_sinks, taking_sinks

SINKS = torch.tensor([-1e4, 0.5, 50.0, 2.0])


def case(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    shapes = ((2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    with_sink = torch.cat((scores, SINKS.double().view(1, 4, 1, 1).expand(2, 4, q.shape[2], 1)), dim=-1)
    return with_sink.softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("kind", ["all", "causal", "window"])
def test_sinks_take_their_weight_beside_what_is_seen(kind: str) -> None:
    queries, keys = (1, 7) if kind == "all" else (7, 7)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if kind != "all":
        seen = seen.tril()
    if kind == "window":
        seen = seen.triu(-2)
        seen[3] = False  # a query that sees nothing gets zeros
    q, k, v = case(queries, keys)
    mask = seen if kind == "window" else None
    options = {"is_causal": kind == "causal", "scale": 0.3, "enable_gqa": True}
    got = sdpa_with_sinks(q, k, v, mask, sink_logits=SINKS, **options)
    torch.testing.assert_close(got, plainly(q, k, v, seen, 0.3))


def test_a_borrowed_attention_takes_sinks_and_is_given_back() -> None:
    module = SimpleNamespace(scaled_dot_product_attention=torch.nn.functional.scaled_dot_product_attention)
    forward = taking_sinks(lambda *qkv: module.scaled_dot_product_attention(*qkv, enable_gqa=True), module)
    q, k, v = case(3, 5)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with_sinks = forward(q, k, v, sinks=SINKS)
    torch.testing.assert_close(with_sinks, plainly(q, k, v, torch.ones(3, 5, dtype=torch.bool), 0.25))
    torch.testing.assert_close(forward(q, k, v), plain)
    torch.testing.assert_close(with_sinks[:, 0], plain[:, 0])
    assert not torch.allclose(with_sinks[:, 1], plain[:, 1])
