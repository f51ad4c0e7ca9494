"""Ranks: strategies, units, what a rank holds, and what is refused before anything is wrapped."""
