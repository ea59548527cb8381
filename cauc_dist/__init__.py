"""Contrastive pre-training on 3-D brain MRI with metadata, exact on any number of ranks."""

__version__ = "0.1.0"
