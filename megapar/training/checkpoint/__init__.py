"""Checkpoints: safetensors files of each rank, and a JSON manifest that says which box of which logical tensor lies where."""

from megapar.training.checkpoint.folder import checkpoints, lock, newest_checkpoint
from megapar.training.checkpoint.load import load_checkpoint
from megapar.training.checkpoint.manifest import FORMAT, read_manifest
from megapar.training.checkpoint.save import Saved, Saver, save_checkpoint

__all__ = ["FORMAT", "Saved", "Saver", "checkpoints", "load_checkpoint", "lock", "newest_checkpoint", "read_manifest", "save_checkpoint"]
