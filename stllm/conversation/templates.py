"""The place of the prompt templates in earlier versions; they are in stllm/processors/templates.py."""

from stllm.processors.templates import BOS, VISUAL, PromptTemplate, Turn

__all__ = ["BOS", "VISUAL", "PromptTemplate", "Turn"]
