"""Cleaning of corpora: normalise, measure, judge by rules, drop duplicates, and say what was done."""
