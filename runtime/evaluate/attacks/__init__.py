"""Attacks on a classifier in the L-inf ball, in pixels: on its own logits, or made on a checkpoint and shown to it.

ball      what an attack may do, and the check that it did no more
draws     a random generator an image, from seed, name, attack and ε
victim    a model under attack: who still stands, how often it was asked
square    Square attack, by logits alone
noise     the control: random signs
transfer  PGD and APGD, by the gradient of a checkpoint
run       attacks × ε × blocks of images → a result a model
"""

from __future__ import annotations
