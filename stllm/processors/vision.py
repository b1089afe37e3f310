"""The place of the frame transforms in earlier versions; they are in stllm/processors/transforms.py."""

from stllm.processors.transforms import ClipTransform, EvalTransform

__all__ = ["ClipTransform", "EvalTransform"]
