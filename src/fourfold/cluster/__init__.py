"""Several machines or GPUs: layers of one quantization shared among Ray actors (fourfold[cluster])."""

from fourfold.cluster.spread import check_workers, spread_over

__all__ = ["check_workers", "spread_over"]
