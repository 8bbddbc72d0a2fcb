"""Engines draw pictures. Every one of them fits `Engine`; `stock` is diffusers' own pipeline."""

from consumer.engine.protocol import Engine, GeneratedImage, LoraFile, OnStep, Pixels, PreparedLoras

__all__ = ["Engine", "GeneratedImage", "LoraFile", "OnStep", "Pixels", "PreparedLoras"]
