"""Fourfold: a Hugging Face LLM in 4-bit microscaling, proved, served, measured.

The rooms and what may import what are on one page in docs/structure.md. Nothing is imported here, so that
``fourfold --help`` starts at once.
"""

from importlib.metadata import version

__version__ = version("fourfold")
