"""Cleaning of corpora: normalise, measure, judge by rules, drop duplicates, and say what was done."""

from megatron_cpt.data.cleaning.profiles import Profile, load_profile, profile_names
from megatron_cpt.data.cleaning.run import clean_files

__all__ = ["Profile", "clean_files", "load_profile", "profile_names"]
