"""Experiments that check, on this machine and on real data, what is claimed of batch normalization.

Read `experiments/` for the questions asked; the rest is what they share: `data/`, `networks`, `train`, `unit`, `runner`, `outcome`.
Needs the extra `lab`.
"""
