"""Raw rows of latents: from global to shared memory, and from there through both MMAs, blocks of 64 channels each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvarn.core.kernels.gluon.attend import row_offsets
from kvarn.core.kernels.gluon.layouts import begin_copy, mma_layout, rows_copy_layout
from kvarn.core.kernels.task import WEIGHT_SHIFT

BLOCK = gl.constexpr(64)


@gluon.constexpr_function
def tile_shared():
    """Return the layout of rows of 64 halfs or words in shared memory, for ldmatrix and for 16 bytes a thread."""
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.jit
def allocate_blocks(BLOCKS: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr):
    """Return shared memory for blocks of rows of 64 numbers: one buffer each, because a part of one can't be turned."""
    blocks = ()
    for _block in gl.static_range(BLOCKS):
        blocks = blocks + (gl.allocate_shared_memory(dtype, [ROWS, BLOCK], tile_shared()),)
    return blocks


@gluon.jit
def _copy_raw(latent, rope, base, offsets, wanted, warps: gl.constexpr):
    """Begin to copy raw rows, which start at offsets after base, as one group; none if not wanted."""
    channel = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, rows_copy_layout(2 * BLOCK, warps)))
    BLOCKS: gl.constexpr = len(latent)
    if wanted:
        for b in gl.static_range(BLOCKS):
            begin_copy(latent[b], base + (offsets[:, None] + b * BLOCK + channel[None, :]))
        begin_copy(rope, base + (offsets[:, None] + BLOCKS * BLOCK + channel[None, :]))
    async_copy.commit_group()


@gluon.jit
def _half_of(buffer, layout: gl.constexpr):
    return buffer.load(layout).to(gl.float32).to(gl.float16)


@gluon.jit
def _attend_raw(m, total, acc, q_blocks, q_scale, latent, rope, base, next_offsets, has_next, ok, warps: gl.constexpr):
    """Fold a block of raw rows, copied to the buffers, into the running softmax, and copy the next.

    ok: [rows, columns]. Rows that no column sees repeat ones that are seen: no memory is read which nothing wrote.
    """
    BLOCKS: gl.constexpr = len(latent)
    R: gl.constexpr = rope.shape[0]
    C: gl.constexpr = q_blocks.shape[2]
    mma: gl.constexpr = mma_layout(warps)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    async_copy.wait_group(0)
    x = gl.zeros((R, C), gl.float32, mma)
    for b in gl.static_range(BLOCKS):
        x = mma_v2(_half_of(latent[b], left), q_blocks.index(b).load(right), x)
    x = mma_v2(_half_of(rope, left), q_blocks.index(BLOCKS).load(right), x)
    x = gl.where(ok, x * q_scale[None, :], float("-inf"))
    m_new = gl.maximum(m, gl.max(x, axis=0))
    decay = gl.exp2(m - m_new)
    p = gl.exp2(x - (m_new - WEIGHT_SHIFT)[None, :])
    p_half = gl.convert_layout(p.to(gl.float16), right)
    new = ()
    for b in gl.static_range(BLOCKS):
        new = new + (mma_v2(_half_of(latent[b].permute((1, 0)), left), p_half, acc[b] * decay[None, :]),)
    _copy_raw(latent, rope, base, next_offsets, has_next, warps)
    return m_new, total * decay + gl.sum(p, axis=0), new


@gluon.jit
def attend_rows(
    m, total, acc, q_blocks, q_scale, latent, rope, base, first, stop, start, end, origin, row_stride, record_stop,
    position, col_ok, RING: gl.constexpr, RAW_BLOCK: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Attend blocks first to stop of RAW_BLOCK rows at positions start to end, each column those that it may see."""
    R: gl.constexpr = rope.shape[0]
    row = gl.arange(0, R, layout=gl.SliceLayout(1, mma_layout(warps)))
    copied = gl.arange(0, R, layout=gl.SliceLayout(1, rows_copy_layout(2 * BLOCK, warps)))
    begin = start + first * RAW_BLOCK
    stop_row = gl.minimum(start + stop * RAW_BLOCK, end)
    offsets = row_offsets(gl.minimum(begin + copied, stop_row - 1), origin, row_stride, RING)
    _copy_raw(latent, rope, base, offsets, begin < stop_row, warps)
    for at in range(begin, stop_row, R):
        pos = at + row
        visible = (pos[:, None] >= record_stop[None, :]) & (pos[:, None] <= position[None, :])
        visible = visible & (pos < stop_row)[:, None] & col_ok[None, :]
        after = row_offsets(gl.minimum(at + R + copied, stop_row - 1), origin, row_stride, RING)
        m, total, acc = _attend_raw(
            m, total, acc, q_blocks, q_scale, latent, rope, base, after, at + R < stop_row, visible, warps
        )  # fmt: skip
    return m, total, acc


@gluon.jit
def attend_sinks(
    m, total, acc, q_blocks, q_scale, latent, rope, base, record_stop, SINK: gl.constexpr, warps: gl.constexpr
):
    """Attend a request's sinks, each column that reads records: it would find them there."""
    R: gl.constexpr = rope.shape[0]
    ROW: gl.constexpr = (len(latent) + 1) * BLOCK
    row = gl.arange(0, R, layout=gl.SliceLayout(1, mma_layout(warps)))
    copied = gl.arange(0, R, layout=gl.SliceLayout(1, rows_copy_layout(2 * BLOCK, warps)))
    offsets = gl.minimum(copied, SINK - 1) * ROW
    _copy_raw(latent, rope, base, offsets, True, warps)
    visible = (row < SINK)[:, None] & (record_stop > 0)[None, :]
    return _attend_raw(m, total, acc, q_blocks, q_scale, latent, rope, base, offsets, False, visible, warps)
