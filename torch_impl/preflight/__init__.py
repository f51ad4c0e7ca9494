"""A run judged before it begins, from shapes alone: findings, memory, collectives."""
