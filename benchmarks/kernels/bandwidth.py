"""The bandwidth limit: how fast this GPU reads, and does nothing else. Best of several grids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.kernels.timing import Timer

_BYTES = 4 << 30
_BLOCKS = (4096, 8192)
_PROGRAMS_PER_SM = (4, 8, 16, 32)
_WORD_BYTES = 4


@triton.jit
def read_kernel(words_ptr, sums_ptr, blocks, BLOCK: tl.constexpr):
    """Sum int32 words; program p takes blocks p, p + programs, ... A thread's words are contiguous: 16-byte loads."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for block in range(program, blocks, tl.num_programs(0)):
        total += tl.load(words_ptr + block * tl.full((), BLOCK, tl.int64) + at)
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


def read_sums(words: torch.Tensor, programs: int, block: int) -> torch.Tensor:
    """Read a buffer once.

    Args:
        words: [n], int32, contiguous; n is a multiple of block.
        programs: programs of the grid.
        block: words of one block.

    Returns:
        [programs], int32, the sum that each program read, modulo 2**32.

    Determinism: bitwise. Graph-safe: yes.
    """
    sums = torch.empty(programs, dtype=torch.int32, device=words.device)
    read_kernel[(programs,)](words, sums, words.shape[0] // block, BLOCK=block)
    return sums


def read_limit_tbps(timer: Timer, device: torch.device, nbytes: int = _BYTES) -> float:
    """Return the read bandwidth in TB/s (10**12 bytes a second), the best over grids.

    Args:
        timer: how to time.
        device: where.
        nbytes: size of the buffer; many times the L2.
    """
    words = torch.randint(-(2**31), 2**31, (nbytes // _WORD_BYTES,), dtype=torch.int32, device=device)
    on_gpu = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    best_us = min(
        timer(lambda _copy, programs=sms * each, block=block: read_sums(words, programs, block), 1).us
        for block in _BLOCKS
        for each in _PROGRAMS_PER_SM
    )
    return nbytes / best_us / 1e6
