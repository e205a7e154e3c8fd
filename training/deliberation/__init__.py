"""Deliberative alignment (arXiv 2412.16339) of a guard of under a million parameters, on one policy, by TRL."""
