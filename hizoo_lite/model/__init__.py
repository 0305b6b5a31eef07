"""A Hugging Face model with packed, branch-aware linears: building, filling, products."""
