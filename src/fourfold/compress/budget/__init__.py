"""Mixed precision within a budget: which layers get which format, chosen by measurement."""
