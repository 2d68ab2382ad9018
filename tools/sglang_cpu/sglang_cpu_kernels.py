"""Python stand-ins for the kernels that SGLang's speculative workers and its draft attention call on a CPU.

Named and called like those of ``sgl_kernel``, of which no CPU build is published; outputs are arguments, as there.
Slow, and for chains of drafts only, which is what KVarN verifies. ``sitecustomize`` hands them out.
"""

from __future__ import annotations

from typing import Any

import torch

_DECODE = """decode_attention_cpu(Tensor q, Tensor(a!) k_buffer, Tensor(b!) v_buffer, float k_scale, float v_scale,
 Tensor(c!) output, Tensor? key, Tensor? value, Tensor loc, Tensor attn_logits, Tensor req_to_token,
 Tensor req_pool_indices, Tensor seq_lens, float sm_scale, float logit_cap, bool is_cross, int window,
 Tensor? encoder_lens, Tensor? sinks) -> ()"""
_EXTEND = """extend_attention_cpu(Tensor q, Tensor? key, Tensor? value, Tensor(a!) output, Tensor k_buffer,
 Tensor v_buffer, float k_scale, float v_scale, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens,
 Tensor extend_seq_lens, Tensor extend_start_loc, int max_len_extend, float sm_scale, float logit_cap, bool is_cross,
 int window, Tensor? encoder_lens, Tensor? sinks, Tensor? tree_mask, bool is_causal) -> ()"""


def register_attention() -> torch.library.Library:
    """Define the two attention operators; they vanish with the library that is returned."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for schema, kernel in ((_DECODE, decode_attention), (_EXTEND, extend_attention)):
        library.define(schema)
        library.impl(schema.partition("(")[0], kernel, "CPU")
    return library


def decode_attention(*arguments: Any) -> None:
    """Write one row of K and V a request, and attend one row of Q over all of its rows."""
    q, k_buffer, v_buffer, _, _, output, key, value, loc, _, table, rows, seq_lens, scale, _, _, window, *_ = arguments
    if key is not None:
        k_buffer[loc], v_buffer[loc] = key.view(-1, *k_buffer.shape[1:]), value.view(-1, *v_buffer.shape[1:])
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        output[i : i + 1] = _attend(q[i : i + 1], k_buffer, v_buffer, table[row, :length], scale, window)


def extend_attention(*arguments: Any) -> None:
    """Attend each request's newest rows of Q, whose K and V stand in the buffers already, causally.

    Where the buffers hold latents (MLA), a prompt that nothing stands before comes as keys and values beside them.
    """
    q, key, value, output, k_buffer, v_buffer, _, _, table, rows, seq_lens, counts, starts, _, scale, *rest = arguments
    _, _, window, _, _, mask, _ = rest
    if mask is not None:
        raise NotImplementedError("The CPU stand-in attends chains only; a tree of drafts needs sgl_kernel.")
    batch = (x.tolist() for x in (rows, seq_lens, counts, starts))
    for row, length, count, start in zip(*batch, strict=True):
        new = slice(start, start + count)
        if key is None or key.shape[-1] == k_buffer.shape[-1]:
            output[new] = _attend(q[new], k_buffer, v_buffer, table[row, :length], scale, window)
        elif length == count:
            output[new] = _attend(q[new], key, value, torch.arange(new.start, new.stop), scale, window)
        else:
            raise NotImplementedError("The CPU stand-in attends to cached latents with absorbed weights only.")


def assign_draft_cache_locs_contiguous_cpu(
    rows: torch.Tensor,
    table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    _width: int,
    topk: int,
    steps: int,
) -> None:
    """Find the slots of the tokens that a draft model is about to write."""
    out.copy_(_slots(table, rows, seq_lens, topk * steps).flatten())


def assign_extend_cache_locs_cpu(
    rows: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, out: torch.Tensor, _width: int
) -> None:
    """Lay the slots of some positions of each request out in a row."""
    spans = zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
    found = torch.cat([table[row, start:end] for row, start, end in spans])
    out[: found.shape[0]] = found


def assign_req_to_token_pool_cpu(
    rows: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor, _width: int
) -> None:
    """Write slots, which lie in a row, as those of some positions of each request."""
    begin = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = slots[begin : begin + end - start]
        begin += end - start


def copy_all_layer_kv_cache_cpu(
    _pointers: torch.Tensor, _strides: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor
) -> None:
    """Move no token: a chain's stay where they are."""
    if not torch.equal(targets, sources):
        raise NotImplementedError("The CPU stand-in moves no tokens; a tree of drafts needs sgl_kernel.")


def fill_accept_out_cache_loc_cpu(accept_index: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Lay the slots of accepted tokens out in a row."""
    accepted = accept_index[accept_index >= 0].long()
    out[: accepted.shape[0]] = slots[accepted]


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, stride: int
) -> None:
    """Take each request's last token of a step."""
    last = torch.arange(accept_lens.shape[0]) * stride + accept_lens - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last])


def build_draft_decode_metadata_cpu(
    table: torch.Tensor, rows: torch.Tensor, _seq_lens: torch.Tensor, topk: int, _steps: int, _width: int
) -> torch.Tensor:
    """Return the slots of all positions, one row for each chain that is being drafted."""
    _require_chain(topk)
    return table[rows]


def build_tree_kernel_efficient_cpu(
    _parents: torch.Tensor,
    _selected: torch.Tensor,
    seq_lens: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor,
    next_token: torch.Tensor,
    _next_sibling: torch.Tensor,
    topk: int,
    _depth: int,
    tokens: int,
    _mode: int,
) -> None:
    """Describe chains of drafts: which token sees which, and where each one stands."""
    _require_chain(topk)
    requests = seq_lens.shape[0]
    cells = requests * tokens * tokens
    mask[:cells] = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(requests, 1).flatten()
    positions.copy_((seq_lens[:, None] + torch.arange(tokens)).flatten())
    index.copy_(torch.arange(requests * tokens).view(requests, tokens))
    next_token[:, :-1] = torch.arange(1, tokens)


def reconstruct_indices_from_tree_mask(
    mask: torch.Tensor,
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
    requests: int,
    tokens: int,
) -> None:
    """Find out where each draft of an n-gram tree stands; the first child of each and its next sibling."""
    above = mask.view(requests, tokens, tokens).tril(-1)
    positions.copy_((above.sum(-1) + seq_lens[:, None]).flatten())
    index.copy_(torch.arange(requests * tokens).view(requests, tokens))
    parent = torch.where(above, torch.arange(tokens), -1).amax(-1)
    later = torch.arange(tokens)[:, None] > torch.arange(tokens)
    twins = (parent[:, :, None] == parent[:, None, :]) & later & (parent >= 0)[:, None, :]
    for found, out in ((above, next_token), (twins, next_sibling)):
        first = torch.where(found, torch.arange(tokens)[:, None], tokens).amin(1)
        out.copy_(torch.where(first < tokens, first, -1))


def verify_tree_greedy_cpu(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Accept drafts as long as they are what the model says comes next."""
    for i in range(candidates.shape[0]):
        at, accepted = 0, 0
        accept_index[i, 0] = retrive_index[i, 0]
        while True:
            token = target_predict[i, at]
            predicts[retrive_index[i, at]] = token
            child = int(retrive_next_token[i, at])
            while child >= 0 and candidates[i, child] != token:
                child = int(retrive_next_sibling[i, child])
            if child < 0 or accepted + 1 == accept_index.shape[1]:
                break
            at, accepted = child, accepted + 1
            accept_index[i, accepted] = retrive_index[i, at]
        accept_token_num[i] = accepted


def _attend(
    q: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor, slots: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Attend [rows, heads, width], the newest of the positions that some slots hold, to a window's unless it is 0."""
    group, rows = q.shape[1] // k_buffer.shape[1], q.shape[0]
    k, v = (buffer[slots.long()].repeat_interleave(group, dim=1) for buffer in (k_buffer, v_buffer))
    newest = slots.shape[0] - rows
    visible = torch.ones(rows, slots.shape[0], dtype=torch.bool).tril(newest)
    if window > 0:
        visible = visible.triu(newest - window + 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def _slots(table: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, count: int) -> torch.Tensor:
    return table[rows[:, None], starts[:, None] + torch.arange(count)]


def _require_chain(topk: int) -> None:
    if topk != 1:
        raise NotImplementedError("The CPU stand-in drafts chains only; a tree of drafts needs sgl_kernel.")
