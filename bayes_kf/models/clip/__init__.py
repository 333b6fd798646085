"""CLIP as a classifier over prompts or over matched pairs, and its adapters."""

from bayes_kf.models.clip.adapters import FeatureAdapter, clip_lora, load_clip, prompt_tokens
from bayes_kf.models.clip.classifier import ClipClassifier, MatchedPairs
from bayes_kf.models.clip.encoders import TwoTowers

__all__ = ["ClipClassifier", "FeatureAdapter", "MatchedPairs", "TwoTowers", "clip_lora", "load_clip", "prompt_tokens"]
