"""Who owns which raw rows: the state of tail rings and sink slots, kept on the device.

A ring belongs to a row of the engine's request table, or to a block of its own. Nothing tells us when a request ends,
and nothing has to: a step either *continues* what a ring holds (same length, same physical page, written by nobody
else since, and for a chunk the same owner tag where the engine tells us names) or takes the ring over.
Rows of an earlier owner are never read, because reads start at `own_start`, the first position that the present
owner wrote itself.

Nothing tells us either how many drafts of a step were accepted: the next step's prefix does. So the same length is
any from which that step's last drafts are missing. What they left in the ring is overwritten before it is read.

A sink slot belongs to a physical page, so that prefix hits find it. It is taken when the page is started at position
0 and given back when the page is started at another position. When no slot is free, the first tile is read from its
record like any other.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from kvarn.core.cache import CacheConfig

_SINK_BLOCK = 1024


def owner_tags(request_ids: Sequence[str]) -> torch.Tensor:
    """Return a 128-bit tag for every request id, [requests, 2], int64, on the CPU."""
    digests = b"".join(hashlib.blake2b(rid.encode(), digest_size=16).digest() for rid in request_ids)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64).view(-1, 2)


class TailState:
    """Ring owners and the map from pages to sink slots. One for all layers.

    Args:
        config: shared numbers.
        rows: rings.
        blocks: blocks of the cache; block 0 is the engine's padding block, whose pages never get a sink slot.
        sink_slots: slots of the sink store.
        device: where the state lives.
    """

    def __init__(
        self, config: CacheConfig[Any], rows: int, blocks: int, sink_slots: int, device: torch.device | str
    ) -> None:
        self.config = config
        # Tokens after the ring's last step, and the page of the last; the same if every draft of it was rejected.
        self.ring_end = torch.zeros(rows, dtype=torch.int32, device=device)
        self.ring_page = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.sure_end = torch.zeros(rows, dtype=torch.int32, device=device)
        self.sure_page = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.own_start = torch.zeros(rows, dtype=torch.int32, device=device)
        self.owner = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.faults = torch.zeros(1, dtype=torch.int32, device=device)
        self._seen_faults = torch.zeros(1, dtype=torch.int32, pin_memory=self.faults.is_cuda)
        pages = blocks * config.tiles_per_block
        self.page_writer = torch.full((pages,), -1, dtype=torch.int32, device=device)
        self.page_slot = torch.full((pages,), -1, dtype=torch.int32, device=device)
        self.free_slots = torch.arange(sink_slots, dtype=torch.int32, device=device)
        self.free_count = torch.full((1,), sink_slots, dtype=torch.int32, device=device)

    def begin(
        self,
        rows: torch.Tensor,
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        tags: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note that every request writes positions prefix_lens to seq_lens.

        Args:
            rows: [requests], the requests' rings.
            prefix_lens: [requests], tokens that stand in the cache already.
            seq_lens: [requests], tokens after this step.
            block_table: [requests, pages], physical pages in order.
            tags: [requests, 2], `owner_tags`; None if the engine names no requests here.

        Returns:
            own_start [requests], int32: first position whose raw rows the request wrote itself; and
            continued [requests], bool. A request that neither continues its ring nor starts on a tile boundary is
            counted in `faults`: its open tile is lost. Graph-safe: yes.
        """
        at, tile = rows.long(), self.config.tile_tokens
        last_page = self._page_of(block_table, prefix_lens - 1)
        ends, sure = self.ring_end[at], self.sure_end[at]
        continued = (sure <= prefix_lens) & (prefix_lens <= ends) & (prefix_lens > 0)
        in_last = (prefix_lens - 1) // tile == (ends - 1) // tile
        continued &= torch.where(in_last, self.ring_page[at], self.sure_page[at]) == last_page
        continued &= self.page_writer[last_page.long()] == rows
        if tags is not None:
            continued &= (self.owner[at] == tags).all(dim=-1)
            self.owner[at] = tags
        own_start = torch.where(continued, self.own_start[at], prefix_lens)
        real = last_page >= self.config.tiles_per_block
        self.faults += (real & (own_start % tile != 0)).sum().to(torch.int32)
        self.own_start[at] = own_start
        sure = torch.maximum(torch.minimum(prefix_lens + 1, seq_lens), seq_lens - self.config.draft_tokens)
        self.ring_end[at], self.ring_page[at] = seq_lens, self._page_of(block_table, seq_lens - 1)
        self.sure_end[at], self.sure_page[at] = sure, self._page_of(block_table, sure - 1)
        return own_start, continued

    def watch_faults(self) -> None:
        """Ask for the count of faults without waiting for it. For the host; not in a graph."""
        self._seen_faults.copy_(self.faults, non_blocking=True)

    def check_faults(self) -> None:
        """Raise RuntimeError if the last count that arrived from the device is above zero. No sync."""
        if int(self._seen_faults) > 0:
            raise RuntimeError(
                "KVarN was given tokens that start inside a tile which their request didn't write, or was told to move "
                "tokens of a tile. The open tile of that request is lost, so its answer would be wrong. Please report "
                "the flags of this server."
            )

    def forget(self, rows: torch.Tensor) -> None:
        """Declare rings empty, int64 [rows]: whoever writes next takes them over. Graph-safe: yes."""
        self.ring_end[rows] = -1

    def note_writers(self, token_page: torch.Tensor, token_row: torch.Tensor) -> None:
        """Note which ring's request writes a page: [tokens] pages, [tokens] rows, int32. Graph-safe: yes."""
        self.page_writer[token_page.long()] = token_row

    def update_sinks(self, token_position: torch.Tensor, token_page: torch.Tensor) -> None:
        """Give sink slots back and take new ones for the pages that this step starts.

        Args:
            token_position: [tokens], int32.
            token_page: [tokens], int32, physical page of every token.

        Determinism: slots are taken in token order. Graph-safe: no; kernels that describe steps do the same.
        """
        if not self.config.sink_tokens:
            return
        for start in range(0, token_position.shape[0], _SINK_BLOCK):
            end = start + _SINK_BLOCK
            self._update_sinks_reference(token_position[start:end], token_page[start:end])

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every sink slot is either free or held by exactly one page. Syncs; for tests."""
        free = self.free_slots[: int(self.free_count)].tolist()
        held = self.page_slot[self.page_slot >= 0].tolist()
        if sorted(free + held) != list(range(self.free_slots.shape[0])):
            raise RuntimeError(f"Sink slots leaked or shared: free {sorted(free)}, held {sorted(held)}.")

    def _page_of(self, block_table: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        tile = position.clamp_min(0).long() // self.config.tile_tokens
        return block_table.gather(1, tile[:, None]).squeeze(1)

    def _update_sinks_reference(self, position: torch.Tensor, page: torch.Tensor) -> None:
        starts = (position % self.config.tile_tokens == 0) & (page >= self.config.tiles_per_block)
        for is_first, p in zip(position[starts].eq(0).tolist(), page[starts].tolist(), strict=True):
            if not is_first and int(self.page_slot[p]) >= 0:
                self.free_slots[int(self.free_count)] = self.page_slot[p]
                self.free_count += 1
                self.page_slot[p] = -1
        for is_first, p in zip(position[starts].eq(0).tolist(), page[starts].tolist(), strict=True):
            if is_first and int(self.page_slot[p]) < 0 and int(self.free_count) > 0:
                self.free_count -= 1
                self.page_slot[p] = self.free_slots[int(self.free_count)]
