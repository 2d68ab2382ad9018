"""Tell whether requests continue their tail rings, on the device."""

import triton
import triton.language as tl


@triton.jit
def continues(
    row, prefix, last_page, ok, ring_end_ptr, ring_page_ptr, sure_end_ptr, sure_page_ptr, page_writer_ptr,
    G: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    """Return which requests find in their rings what they left there, as `TailState.begin` says, names aside.

    Args:
        row, prefix, last_page: [requests]; ring, committed length, and the page of the last committed token.
        ok: whose values count.
    """
    end = tl.load(ring_end_ptr + row, mask=ok, other=-1)
    held_page = tl.load(ring_page_ptr + row, mask=ok, other=-1)
    sure_end = end
    if DRAFTS > 0:
        sure_end = tl.load(sure_end_ptr + row, mask=ok, other=0)
        sure_page = tl.load(sure_page_ptr + row, mask=ok, other=-1)
        held_page = tl.where((prefix - 1) // G == (end - 1) // G, held_page, sure_page)
    continued = (sure_end <= prefix) & (prefix <= end) & (prefix > 0) & (held_page == last_page)
    return continued & (tl.load(page_writer_ptr + last_page, mask=ok, other=-1) == row)
