"""Workloads: one file, one profile name on the command line; each exports ``WORKLOAD``."""
