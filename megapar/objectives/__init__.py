"""Pretraining objectives: text and a generator to a Sample, samples to a TokenBatch and its targets, those to an fp32 sum of losses."""
