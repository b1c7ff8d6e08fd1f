"""Records in, one self-contained page out. The page takes no sides: what is worse stands beside what is
better."""

from fourfold.report.page import write_report

__all__ = ["write_report"]
