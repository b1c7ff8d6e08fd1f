"""Compression that looks at activations: one decoder layer after the other, in transformers' own modules."""
