"""What a run has reached, for programs (report.json) and for people (report.md with one picture)."""

from megatron_cpt.reporting.picture import bits_per_byte_picture
from megatron_cpt.reporting.report import read_report, write_report

__all__ = ["bits_per_byte_picture", "read_report", "write_report"]
