"""What a run will need, on paper, before it runs."""
