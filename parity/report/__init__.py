"""Views of the results stream."""
