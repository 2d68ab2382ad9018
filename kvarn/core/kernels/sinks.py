"""Keep the map from a first page to its sink slot, on the device."""

import triton
import triton.language as tl


@triton.jit
def move_sink_slots(count, page_slot_ptr, free_slots_ptr, page, starts, at_zero):
    """Give the slots of pages that start as another page back, hand slots to those that start at position 0.

    Args:
        count: free slots.
        page, starts, at_zero: [tokens]; the page of each, whether it starts there, whether at position 0.

    Returns:
        The free slots left.
    """
    slot = tl.load(page_slot_ptr + page, mask=starts, other=-1)
    gives = starts & ~at_zero & (slot >= 0)
    rank = tl.cumsum(gives.to(tl.int32), axis=0) - 1
    tl.store(free_slots_ptr + count + rank, slot, mask=gives)
    tl.store(page_slot_ptr + page, -1, mask=gives)
    count += tl.sum(gives.to(tl.int32), axis=0)
    # slots that were given back are taken by other threads
    tl.debug_barrier()
    takes = starts & at_zero & (slot < 0)
    rank = tl.cumsum(takes.to(tl.int32), axis=0)
    takes = takes & (rank <= count)
    tl.store(page_slot_ptr + page, tl.load(free_slots_ptr + count - rank, mask=takes, other=-1), mask=takes)
    count -= tl.sum(takes.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count
