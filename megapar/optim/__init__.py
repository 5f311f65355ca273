"""FusedAdamW, and what optimizers need to know about sharded parameters."""
