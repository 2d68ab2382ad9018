"""From SGLang's ForwardBatch to the core's Step. No kernels, no host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn.core.table_steps import TableSteps

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from kvarn.core.step import Step


class StepBuilder(TableSteps):
    """Describes forward passes to the core."""

    def decode(self, batch: ForwardBatch) -> Step:
        """Describe a decode step. Graph-safe: yes."""
        return self.uniform(batch.req_pool_indices, batch.seq_lens, 1)

    def verify(self, batch: ForwardBatch) -> Step:
        """Describe a step that verifies as many drafts of every request. Graph-safe: yes.

        The batch's lengths are the committed ones: those of the drafts are not in them yet.
        """
        rows = batch.req_pool_indices
        rows_each = batch.input_ids.shape[0] // rows.shape[0]
        return self.uniform(rows, batch.seq_lens + rows_each, rows_each)

    def chunk(self, batch: ForwardBatch) -> Step:
        """Describe a prefill chunk or a mixed batch.

        Raises:
            RuntimeError: an earlier chunk neither continued its tail ring nor started on a tile boundary.
        """
        return self.ragged(
            batch.req_pool_indices,
            batch.extend_prefix_lens,
            batch.seq_lens,
            batch.extend_prefix_lens_cpu,
            batch.extend_seq_lens_cpu,
            batch.rids or [""] * batch.batch_size,
        )
