"""Adapters: training a few small matrices beside a frozen model."""

from lab.adapt.lora import LoRA

__all__ = ["LoRA"]
