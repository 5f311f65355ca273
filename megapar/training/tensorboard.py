"""Metrics for TensorBoard, beside `metrics.jsonl`: an extra that `pip install 'megapar[tensorboard]'` brings."""

from __future__ import annotations

from pathlib import Path

from megapar.training.metrics import Record


class TensorBoardSink:
    """Writes every number of a record as a scalar at the record's step; those of nested objects as `checkpoint/stall`.

    step: where the run goes on from; TensorBoard forgets what it was told of later ones. Raises ValueError where it is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            # Here: importing this module must not need it, nor take its second.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"TensorBoard is not installed ({error}): pip install 'megapar[tensorboard]', or leave it out") from error
        self._folder, self._make = str(folder), SummaryWriter
        self._writer = SummaryWriter(self._folder, purge_step=step + 1 if step else None)

    def go_back(self, step: int) -> None:
        """Forgets the steps after it, which will be told again."""
        self._writer.close()
        self._writer = self._make(self._folder, purge_step=step + 1)

    def log(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def scalars(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name, without its step; texts and lists are none."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and prefix + name != "step":
            found[prefix + name] = float(value)
    return found
