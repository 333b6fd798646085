"""Drawn adapters in service: how far from the mean to draw them, and a client of a server that holds them.

``posterior.export_adapters`` writes draws as ordinary LoRA folders with a list, ``draws.json``. PEFT mixes them in one
batch (``adapter_names``); servers of several adapters, such as vLLM and LoRAX, hold them beside one base model.
"""

from bayes_kf.serving.draw_width import draw_width
from bayes_kf.serving.drawn_adapters import DrawnAdapters, NextTokens

__all__ = ["DrawnAdapters", "NextTokens", "draw_width"]
