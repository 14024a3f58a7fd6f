"""The input rows: Token Distillation."""
