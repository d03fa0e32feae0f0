"""From text files to training samples: documents, indexed datasets, and the order they are visited in."""

from megatron_cpt.data.batches import IGNORED, Batch, Samples, ValidationWindows, batch, validation_windows
from megatron_cpt.data.build import build_dataset, check_no_dataset, verify_dataset
from megatron_cpt.data.describe import describe, describe_document, describe_sample, tokenizer_of
from megatron_cpt.data.documents import Document, is_held_out, read_documents, split_held_out, work_of
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.sampler import Place, Sample, SamplePlan

__all__ = [
    "IGNORED",
    "Batch",
    "Document",
    "IndexedDataset",
    "Place",
    "Sample",
    "SamplePlan",
    "Samples",
    "ValidationWindows",
    "batch",
    "build_dataset",
    "check_no_dataset",
    "describe",
    "describe_document",
    "describe_sample",
    "is_held_out",
    "read_documents",
    "split_held_out",
    "tokenizer_of",
    "validation_windows",
    "verify_dataset",
    "work_of",
]
