"""Optimizers with states in few bits; the front door is ``quartet.optim``."""

from quartet.runtime.optim.algorithms import SGD, Adam, AdamW, Lion
from quartet.runtime.optim.base import LowBitOptimizer
from quartet.runtime.optim.ramping import QRamping

__all__ = ["SGD", "Adam", "AdamW", "Lion", "LowBitOptimizer", "QRamping"]
