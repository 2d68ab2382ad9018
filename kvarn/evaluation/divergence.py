"""How far two sets of final hidden states are apart, as distributions of the next token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Tokens whose distributions are held at the same time.
_BLOCK = 256
_QUARTERS = 4


@dataclass(frozen=True, slots=True)
class Divergence:
    """What a cache changes about a model's predictions, over one text. KL is in nats, of exact against changed.

    Args:
        kl_mean, kl_median, kl_p99: Kullback-Leibler divergence over positions.
        kl_quarters: its mean in each quarter of the text.
        kl_turns: its mean in each turn of a conversation.
        top1: share of positions with the same most likely token.
        ppl: perplexity of the text with the cache.
        ppl_exact: perplexity without.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_quarters: tuple[float, ...]
    kl_turns: tuple[float, ...]
    top1: float
    ppl: float
    ppl_exact: float


@torch.no_grad()
def divergence(
    head: Callable[[torch.Tensor], torch.Tensor],
    exact: torch.Tensor,
    changed: torch.Tensor,
    ids: torch.Tensor,
    turns: Sequence[int] = (0,),
) -> Divergence:
    """Compare the predictions that two sets of hidden states give.

    Args:
        head: the language model head, [tokens, hidden] to logits.
        exact: [tokens, hidden], without the cache under test.
        changed: [tokens, hidden], with it.
        ids: [tokens], the text.
        turns: first token of every turn.
    """
    kl, same, losses = [], [], []
    blocks = zip(exact.split(_BLOCK), changed.split(_BLOCK), ids.roll(-1).split(_BLOCK), strict=True)
    for exact_rows, changed_rows, following in blocks:
        p = torch.log_softmax(head(exact_rows).float(), dim=-1)
        q = torch.log_softmax(head(changed_rows).float(), dim=-1)
        kl.append((p.exp() * (p - q)).sum(dim=-1).cpu())
        same.append((p.argmax(dim=-1) == q.argmax(dim=-1)).cpu())
        wanted = following.to(p.device)[:, None]
        losses.append(-torch.stack((p.gather(1, wanted), q.gather(1, wanted))).squeeze(-1).cpu())
    values = torch.cat(kl).double()
    # nothing follows the last token
    ppl_exact, ppl = torch.cat(losses, dim=1)[:, :-1].double().mean(dim=1).exp().tolist()
    return Divergence(
        kl_mean=float(values.mean()),
        kl_median=float(values.median()),
        kl_p99=float(values.quantile(0.99)),
        kl_quarters=tuple(float(part.mean()) for part in values.tensor_split(_QUARTERS)),
        kl_turns=tuple(float(part.mean()) for part in values.tensor_split(list(turns[1:]))),
        top1=float(torch.cat(same).double().mean()),
        ppl=ppl,
        ppl_exact=ppl_exact,
    )
