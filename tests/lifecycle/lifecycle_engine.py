"""What an engine does to a cache, in plain Python: rows, pages, a prefix tree of pages, and requests that come and go.

Modelled on SGLang: rows are reused last in, first out; full tiles are published right after the chunk that fills them;
a tile that another request published first replaces one's own; a hit is a whole number of tiles and leaves at least
one token to compute; the partial last page is freed at the end; retraction saves nothing.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_ROOT = 0
# A token that no request samples.
_WRONG = 99


def extend_tags(tags: list[int], tokens: Sequence[int]) -> None:
    """Append one tag a token; a tag stands for the whole sequence up to its position."""
    last = tags[-1] if tags else _ROOT
    for token in tokens:
        last = hash((last, token))
        tags.append(last)


@dataclass(eq=False)
class Request:
    """A request and what the engine knows about it.

    `tokens` includes a sampled token whose K and V aren't computed yet. `rows` holds (request id, tag) for every token:
    what a raw row of this position must contain. `shared` leading tiles belong to the tree. It decodes from its first
    sampled token on.
    """

    rid: str
    tokens: list[int]
    greedy: bool = True
    row: int = -1
    computed: int = 0
    shared: int = 0
    allocated: int = 0
    decodes: bool = False
    tags: list[int] = field(default_factory=list)
    rows: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._note(self.tokens)

    def sample(self, noise: int) -> None:
        """Append the next token: the same one for the same sequence, unless the request isn't greedy."""
        token = self.tags[-1] & 1 if self.greedy else noise
        self.tokens.append(token)
        self.decodes = True
        self._note([token])

    def draft(self, right: int, count: int, noise: int) -> None:
        """Append drafts: so many tokens that will be its own, then others."""
        for _ in range(right):
            self.sample(noise)
        wrong = [_WRONG] * (count - right)
        self.tokens += wrong
        self._note(wrong)

    def reject(self, length: int) -> None:
        """Drop every token past a length."""
        del self.tokens[length:], self.tags[length:], self.rows[length:]

    def _note(self, tokens: Sequence[int]) -> None:
        known = len(self.tags)
        extend_tags(self.tags, tokens)
        self.rows.extend((self.rid, tag) for tag in self.tags[known:])


@dataclass
class Node:
    """A published tile: its page, the tag of the tile before it, users and successors."""

    page: int
    parent: int
    locks: int = 0
    children: int = 0


class Engine:
    """Rows, pages and the prefix tree. Row 0 and page 0 are padding."""

    def __init__(self, tile_tokens: int, rows: int, pages: int, max_tiles: int, *, newest_page_first: bool) -> None:
        self.tile_tokens = tile_tokens
        self.max_tokens = tile_tokens * max_tiles
        self.table = [[0] * max_tiles for _ in range(rows)]
        self.free_rows = list(range(1, rows))
        self.free_pages = deque(range(1, pages))
        self.page_life = [0] * pages
        self.tree: dict[int, Node] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counts: Counter[str] = Counter()
        self._newest_page_first = newest_page_first
        self._used_rows: set[int] = set()
        self._used_pages: set[int] = set()

    def submit(self, rid: str, tokens: list[int], *, greedy: bool = True) -> Request:
        request = Request(rid, list(tokens), greedy)
        self.waiting.append(request)
        return request

    def admit(self, request: Request) -> bool:
        """Give a waiting request a row and whatever prefix the tree holds."""
        if not self.free_rows:
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.row = self.free_rows.pop()
        self.counts["row reuse"] += request.row in self._used_rows
        self._used_rows.add(request.row)
        limit = (len(request.tokens) - 1) // self.tile_tokens
        while request.shared < limit and (node := self.tree.get(self._tile_tag(request, request.shared))):
            self.table[request.row][request.shared] = node.page
            node.locks += 1
            request.shared += 1
        request.allocated = request.shared
        request.computed = request.shared * self.tile_tokens
        self.counts["hits"] += request.shared > 0
        return True

    def reserve(self, request: Request, count: int) -> bool:
        """Find pages for `count` more tokens, evicting what nobody uses."""
        needed = -(-(request.computed + count) // self.tile_tokens)
        if needed * self.tile_tokens > self.max_tokens:
            return False
        missing = needed - request.allocated
        if missing > len(self.free_pages):
            self.evict(missing - len(self.free_pages))
        if missing > len(self.free_pages):
            return False
        for _ in range(missing):
            page = self.free_pages.pop() if self._newest_page_first else self.free_pages.popleft()
            self.counts["page reuse"] += page in self._used_pages
            self._used_pages.add(page)
            self.page_life[page] += 1
            self.table[request.row][request.allocated] = page
            request.allocated += 1
        return True

    def publish(self, request: Request, length: int) -> None:
        """Put the full tiles below `length` into the tree; give way to tiles that stand there already."""
        for tile in range(request.shared, length // self.tile_tokens):
            tag, own = self._tile_tag(request, tile), self.table[request.row][tile]
            parent = self._tile_tag(request, tile - 1) if tile else _ROOT
            node = self.tree.get(tag)
            if node is None:
                node = self.tree[tag] = Node(own, parent)
                if tile:
                    self.tree[parent].children += 1
            else:
                self._free(own)
                self.table[request.row][tile] = node.page
                self.counts["deduplications"] += 1
            node.locks += 1
            request.shared += 1

    def release(self, request: Request, keep: int) -> None:
        """Take row and pages from a request; its first `keep` tokens may stay in the tree."""
        self.publish(request, keep)
        for tile in range(request.shared):
            self.tree[self._tile_tag(request, tile)].locks -= 1
        for tile in range(request.shared, request.allocated):
            self._free(self.table[request.row][tile])
        self.free_rows.append(request.row)
        self.running.remove(request)
        request.row, request.computed, request.shared, request.allocated, request.decodes = -1, 0, 0, 0, False

    def retract(self, request: Request) -> None:
        """Send a running request back to the queue, nothing of it saved."""
        self.release(request, 0)
        self.waiting.insert(0, request)
        self.counts["retractions"] += 1

    def evict(self, count: int) -> None:
        """Drop up to `count` published tiles that nobody uses, oldest first, leaves before their parents."""
        while count > 0:
            tags = [tag for tag, node in self.tree.items() if not node.locks and not node.children]
            if not tags:
                return
            for tag in tags[:count]:
                node = self.tree.pop(tag)
                if node.parent != _ROOT:
                    self.tree[node.parent].children -= 1
                self._free(node.page)
                self.counts["evictions"] += 1
            count -= len(tags)

    def flush(self) -> None:
        """Forget every published tile; only without running requests."""
        assert not self.running
        self.evict(len(self.tree))
        self.counts["flushes"] += 1

    def check(self) -> None:
        """Every row and page is free, published or private, and only one of these."""
        private = [self.table[r.row][tile] for r in self.running for tile in range(r.shared, r.allocated)]
        held = sorted([*self.free_pages, *private, *(node.page for node in self.tree.values())])
        assert held == list(range(1, len(self.page_life)))
        assert sorted(self.free_rows + [r.row for r in self.running]) == list(range(1, len(self.table)))

    def _free(self, page: int) -> None:
        self.page_life[page] += 1
        self.free_pages.append(page)

    def _tile_tag(self, request: Request, tile: int) -> int:
        return request.tags[(tile + 1) * self.tile_tokens - 1]
