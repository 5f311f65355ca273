"""Pretraining objectives: each returns the fp32 sum of its token losses and how many tokens it counted."""
