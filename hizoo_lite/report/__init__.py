"""What a run left, as a page."""
