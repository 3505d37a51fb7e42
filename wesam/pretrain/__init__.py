"""Trains the embedded model on procedural scenes alone: ``python -m wesam.pretrain --out DIR``."""
