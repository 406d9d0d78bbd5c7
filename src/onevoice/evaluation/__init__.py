"""Scoring: how good estimates are.

In: an extractor and trials, or two signals. Out: metrics per trial, and their statistics. This room must not know
training.
"""
