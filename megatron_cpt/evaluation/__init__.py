"""What a model knows: bits per byte of held-out text, and a probe of told facts."""

from megatron_cpt.evaluation.bits_per_byte import bits_per_byte, score_dataset
from megatron_cpt.evaluation.parity import logit_parity
from megatron_cpt.evaluation.probe import probe_accuracy

__all__ = ["bits_per_byte", "logit_parity", "probe_accuracy", "score_dataset"]
