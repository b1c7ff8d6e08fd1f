"""The nouns every room shares: errors, records, schemes, protocols, durable files. Imports no torch."""
