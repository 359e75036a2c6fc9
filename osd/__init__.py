"""Online stochastic distillation of the drafts (arXiv 2602.01956)."""
