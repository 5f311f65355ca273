"""What optimizers need to know about sharded parameters."""
