"""One definition of the math per op: formula, cost, plain PyTorch reference. Bodies only: no process group is known here."""
