"""What kernels may differ by, in one place, with the reason."""

import torch

# Relative RMS against float64 over the same records: codes are exact in the MMA, the weights are fp16. A GPU's MMA also
# truncates its sums: an H100 leaves 0.8e-3 to 1.2e-3 in fp16 where the interpreter leaves 0.3e-3 to 0.7e-3.
ATTEND_RMS = {torch.float16: 1.6e-3 if torch.cuda.is_available() else 1.0e-3, torch.bfloat16: 2.5e-3}
# Largest error of one element over the RMS of the output, beside its own rounding to the output's dtype.
ATTEND_MAX = 2.0e-2
# Log-sum-exp in nats: q times a channel scale is rounded to fp16, so large logits lose in proportion.
LSE = 5.0e-3
LSE_RELATIVE = 2.0e-4
# Over latents a query is rounded to fp16 once for all rows: a large part that they share shifts all logits alike.
LATENT_LSE_RELATIVE = 1.0e-3


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return ||got - want|| / ||want|| in float64."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm())


def relative_max(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference, beyond the rounding of got to its dtype, over the RMS of what is wanted."""
    rounding = torch.finfo(got.dtype).eps / 2
    got, want = got.double().cpu(), want.double().cpu()
    return float(((got - want).abs() - rounding * want.abs()).max() / want.square().mean().sqrt())
