"""Attacks on a classifier that change each pixel by at most ε (L-inf).

config   settings of a run
target   the L-inf ball, and a model under attack
methods  Square attack, random noise as a control, and the transfer of gradient attacks
run      attacks × ε × blocks of images → one result per model
results  the format of a result
"""

from __future__ import annotations
