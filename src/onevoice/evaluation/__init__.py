"""Judging: estimates and targets in, numbers out.

In: an extractor and trials, or two signals. Out: metrics per trial and their summary. This room does not know training.
"""
