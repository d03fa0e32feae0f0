"""What a model knows: bits per byte of held-out text, a probe of told facts, and the certificate of a surgery."""

from megatron_cpt.evaluation.bits_per_byte import bits_per_byte, score_dataset
from megatron_cpt.evaluation.parity import logit_parity
from megatron_cpt.evaluation.probe import probe_accuracy
from megatron_cpt.evaluation.step_zero import CERTIFICATE, certify, check_certificate

__all__ = [
    "CERTIFICATE",
    "bits_per_byte",
    "certify",
    "check_certificate",
    "logit_parity",
    "probe_accuracy",
    "score_dataset",
]
