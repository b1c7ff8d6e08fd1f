"""Metrics: one file, one metric; each exports ``METRIC`` and is computed from RequestRecords only."""
