"""The papers' printed memory figures, recomputed: which follow, under which convention, and which do not.

`recompute()` returns every figure of GaLore (arXiv:2403.03507), GaLore-mini (NeurIPS 2024 workshop) and Q-GaLore
(arXiv:2407.08296) with a verdict. Perplexities and measured totals are not among them.
"""

from __future__ import annotations

from galore_mem.papers.recompute import papers, recompute
from galore_mem.papers.result import NOT_REPRODUCED, REPRODUCED, Cell, PapersResult, TableSummary

__all__ = ["NOT_REPRODUCED", "REPRODUCED", "Cell", "PapersResult", "TableSummary", "papers", "recompute"]
