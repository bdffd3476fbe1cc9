"""Callbacks for the training loops of others; each module imports its framework, so name it in full.

from allot.integrations.transformers import KeepZeros   # Trainer of Hugging Face
from allot.integrations.lightning import KeepZeros      # Trainer of Lightning
"""
