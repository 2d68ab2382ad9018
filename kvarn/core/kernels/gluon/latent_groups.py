"""Attention over latents by Hopper's warp groups, 64 query columns a program: what `kernels.latent.attend` computes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.gluon.attend import span_of
from kvarn.core.kernels.gluon.group_tiles import (
    HALF,
    TOKENS,
    attend_records_by_groups,
    attend_rows_by_groups,
    attend_sinks_by_groups,
    begin_records_of_groups,
    groups_mma,
    load_queries_of_groups,
)
from kvarn.core.kernels.read_rule import record_end
from kvarn.core.kernels.task import LOG2E, WEIGHT_SHIFT, load_task, part_of_task
from kvarn.core.kernels.work import units_of


@gluon.jit(do_not_specialize=["tasks", "q_heads", "block_table_stride"])
def attend_latents_by_groups_kernel(
    q_ptr, unit_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_ptr, task_request_ptr, task_row_ptr, work_end_ptr,
    rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr, query_start_ptr, block_table_ptr, partial_ptr,
    partial_lse_ptr, scale, tasks, q_heads, record_block_stride, record_tile_stride, tail_row_stride,
    sink_slot_stride, chunk_token_stride, block_table_stride,
    LATENT: gl.constexpr, ROPE: gl.constexpr, G: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr,
    ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, RING: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
    SINK: gl.constexpr, ROWS_IN_RING: gl.constexpr, CANONICAL: gl.constexpr, RAW_BLOCK: gl.constexpr,
    TASK_BLOCK: gl.constexpr, SHARE: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `kernels.latent.attend.attend_latents_kernel`, for LATENT of 512 in 4 bits, ROPE of 64, G of 128."""
    allow_next(CHAINED)
    # A request in decode reads no record that it seals, where newer tokens are read exact: it waits for queries only.
    WAIT_FIRST: gl.constexpr = not (ROWS_IN_RING and TAIL > 0)
    if WAIT_FIRST:
        wait_for_previous(CHAINED)
    program = gl.program_id(0)
    head_block = gl.program_id(1)
    of_columns: gl.constexpr = gl.SliceLayout(1, groups_mma(TOKENS))
    of_output: gl.constexpr = groups_mma(HALF)
    column = gl.arange(0, COLUMNS, layout=of_columns)
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, of_output))
    ROW: gl.constexpr = LATENT + ROPE
    share_begin, share_end, first_task, last_task = span_of(
        program, gl.num_programs(0), work_end_ptr, tasks, TASK_BLOCK, num_warps
    )
    if share_begin == share_end:
        last_task = first_task - 1
    for task in range(first_task, last_task + 1):
        begin, end = part_of_task(task, share_begin, share_end, work_end_ptr, SHARE)
        request, first_row, query_start, query_rows, prefix, length, own_start, sink_slot, ring_row = load_task(
            task, task_request_ptr, task_row_ptr, query_start_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr,
            rows_ptr,
        )  # fmt: skip
        if not WAIT_FIRST:  # noqa: SIM102 (joined, the wait would be compiled where there was one)
            if own_start == prefix:
                # a request's first step may read what another seals in the same step
                wait_for_previous(CHAINED)
        row = first_row + column // GROUP
        col_ok = (column < ROWS * GROUP) & (row < query_rows)
        position = prefix + row
        last = prefix + gl.minimum(first_row + ROWS, query_rows) - 1
        tiles, ring_units, chunk_units, raw_start, ring_end, chunk_start = units_of(
            prefix + first_row, last, prefix, length, own_start, G, TAIL, RAW_BLOCK, ROWS_IN_RING, CANONICAL
        )
        committed = prefix
        if CANONICAL:
            committed = length
        record_stop = gl.where(col_ok, record_end(committed, position, own_start, TAIL, G), 0)
        sinks = 0
        if sink_slot >= 0:
            sinks = SINK
        table = block_table_ptr + request.to(gl.int64) * block_table_stride
        # queries are loaded while these are on their way
        k, vectors, rope_vectors, words = begin_records_of_groups(
            records_ptr, table, begin, gl.minimum(end, tiles), record_block_stride, record_tile_stride, TILES, FIELDS,
            SCALES, ROPE_START, ROPE_FIELDS, ROPE_SCALES,
        )  # fmt: skip
        wait_for_previous(CHAINED)
        q_row = (query_start + row).to(gl.int64) * q_heads + head_block * GROUP + column % GROUP
        q, q_unit = load_queries_of_groups(q_ptr, unit_ptr, q_row, col_ok)
        q_scale = q_unit * (scale * LOG2E)
        m, mass, acc = attend_records_by_groups(
            k, vectors, rope_vectors, words, records_ptr, table, begin, gl.minimum(end, tiles), sinks,
            record_stop, q, q_scale, record_block_stride, record_tile_stride, TILES, FIELDS, SCALES, ROPE_START,
            ROPE_FIELDS, ROPE_SCALES, ROWS > 1,
        )  # fmt: skip
        if SINK > 0:  # noqa: SIM102 (joined, the body would be compiled for no sinks too)
            if (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
                m, mass, acc = attend_sinks_by_groups(
                    m, mass, acc, q, q_scale, k, sinks_ptr + sink_slot * sink_slot_stride, record_stop,
                    SINK,
                )  # fmt: skip
        base = tails_ptr + ring_row * tail_row_stride
        m, mass, acc = attend_rows_by_groups(
            m, mass, acc, q, q_scale, k, base, gl.maximum(begin - tiles, 0),
            gl.minimum(end - tiles, ring_units), raw_start, ring_end, 0, ROW, record_stop, position, col_ok, RING,
            RAW_BLOCK,
        )  # fmt: skip
        if not ROWS_IN_RING:
            seen = tiles + ring_units
            base = chunk_ptr + query_start.to(gl.int64) * chunk_token_stride
            m, mass, acc = attend_rows_by_groups(
                m, mass, acc, q, q_scale, k, base, gl.maximum(begin - seen, 0),
                gl.minimum(end - seen, chunk_units), chunk_start, length, prefix, chunk_token_stride, record_stop,
                position, col_ok, 0, RAW_BLOCK,
            )  # fmt: skip

        total = gl.convert_layout(gl.sum(gl.sum(mass, axis=2), axis=1), of_columns)
        out_row = ((program + task).to(gl.int64) * gl.num_programs(1) + head_block) * COLUMNS + column
        lse = gl.where(total > 0, m + gl.log2(gl.maximum(total, 1e-37)) - WEIGHT_SHIFT, float("-inf"))
        gl.store(partial_lse_ptr + out_row, lse, mask=col_ok)
        mask = gl.convert_layout(col_ok & (total > 0), gl.SliceLayout(1, of_output))[:, None]
        at = gl.convert_layout(out_row, gl.SliceLayout(1, of_output))[:, None] * LATENT + channel[None, :]
        total = gl.convert_layout(gl.maximum(total, 1e-37), gl.SliceLayout(1, of_output))[:, None]
        gl.store(partial_ptr + at, acc[0] / total, mask=mask)
        gl.store(partial_ptr + HALF + at, acc[1] / total, mask=mask)
    wait_for_previous(CHAINED)
