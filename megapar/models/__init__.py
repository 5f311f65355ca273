"""The models that megapar pretrains."""
